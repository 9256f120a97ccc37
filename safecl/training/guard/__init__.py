"""Watches the safety of a run while it trains: measurements, the probe, and what follows where the gate fails."""
