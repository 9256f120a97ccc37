"""Counts the bytes and the time that a run takes, from a model's structure and a config alone."""
