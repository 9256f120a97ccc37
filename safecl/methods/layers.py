"""Numbers of layers in the names of weights."""

from __future__ import annotations

import re
from collections.abc import Sequence

from safecl.config import ConfigError

SAFETY = 6 / 32, 12 / 32
"""Depths of the first and the last safety layer, see `safety_range`."""

_NUMBER = re.compile(r"\.(?:layers|layer|h|blocks|block)\.(\d+)\.")


def number_of(name: str) -> int | None:
    """Return the layer, counted from 0, that a weight belongs to; None for embeddings, the last norm and the head."""
    found = _NUMBER.search(f".{name}")
    return int(found[1]) if found else None


def check_numbers(key: str, numbers: Sequence[int], names: Sequence[str]) -> None:
    """Raise ConfigError where a number is that of no layer. names: those of all trained weights."""
    known = {number for name in names if (number := number_of(name)) is not None}
    if missing := [number for number in numbers if number not in known]:
        there = f"the layers are 0 to {max(known)}" if known else "the weights' names have no layers"
        raise ConfigError(f"{key}: there is no layer {missing[0]}; {there}")


def safety_range(names: Sequence[str]) -> range:
    """Return the layers that tell disallowed prompts from others: those from 6/32 to 12/32 of the depth, the range that
    Li et al. 2025 (arXiv 2408.17003) name for Llama-2-7B-chat. names: those of all trained weights."""
    count = max((number for name in names if (number := number_of(name)) is not None), default=-1) + 1
    first, last = (int(depth * count) for depth in SAFETY)
    return range(first, last + 1)
