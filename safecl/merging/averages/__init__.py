"""Merges that average weights."""
