"""Sweeps: a grid of runs over settings and seeds, one table of what they measured, and the choice of a winner."""
