"""Ranks, nodes, launchers and signals."""
