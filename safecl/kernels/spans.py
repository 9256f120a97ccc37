"""Consecutive chunks of a range."""

from __future__ import annotations

from collections.abc import Iterator


def spans(total: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of consecutive chunks of length ``step``; the last one may be shorter."""
    return ((start, min(start + step, total)) for start in range(0, total, step))
