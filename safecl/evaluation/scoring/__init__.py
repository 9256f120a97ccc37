"""Scorers and judges of answers."""
