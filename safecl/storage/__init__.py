"""Whole-or-absent files, sizes, the cache folder, model folders."""
