"""Numbers of layers in the names of weights."""

from __future__ import annotations

import re
from collections.abc import Sequence

from safecl.config import ConfigError

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
