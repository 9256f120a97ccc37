"""Verbs that judge and compare what runs have made."""
