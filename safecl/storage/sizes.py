"""Byte counts as people read them."""

from __future__ import annotations


def format_bytes(count: int) -> str:
    """1234567890 -> "1.2 GB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
