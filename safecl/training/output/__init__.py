"""Prints and writes a run: console, metrics, results and model cards."""
