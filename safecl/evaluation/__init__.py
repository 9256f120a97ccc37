"""Safety scorers, utility metrics, intervals and the gate."""
