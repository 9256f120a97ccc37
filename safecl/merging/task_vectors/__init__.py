"""Merges that add task vectors, tuned - base, to a base."""
