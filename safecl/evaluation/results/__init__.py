"""Results of measurements, their records, and numbers computed from them. Nothing here needs torch."""
