"""Tests of whole training runs."""
