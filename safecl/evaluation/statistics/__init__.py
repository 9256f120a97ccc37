"""Intervals and continual-learning metrics; numbers only."""
