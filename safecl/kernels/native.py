"""Finds and loads the C++ library (`csrc/`, built by setup.py) without torch headers: one build serves every torch and Python."""

from __future__ import annotations


def missing() -> str:
    """Why the library cannot be used; "" when it can."""
    return "the C++ library is not built"
