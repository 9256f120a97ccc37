"""What was measured: results, their records, and what is read and computed from them. Nothing here needs torch."""
