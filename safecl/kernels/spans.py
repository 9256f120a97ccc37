"""Consecutive chunks of a length."""

from __future__ import annotations

from collections.abc import Iterator


def spans(total: int, step: int) -> Iterator[tuple[int, int]]:
    """(start, end) of consecutive chunks of ``step``; the last one may be shorter."""
    return ((start, min(start + step, total)) for start in range(0, total, step))
