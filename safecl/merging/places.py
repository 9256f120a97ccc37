"""The place of a tensor in a model, and coefficients that differ between places.

A coefficient is a number; a list, whose values are interpolated over the blocks from the first to the last; or a
mapping from patterns to either, of which the first that matches counts:

    alpha=0.5
    alpha=[0.2,0.5,0.5]
    alpha={"*.mlp.*": 0.3, "0-7": [0, 1], "*": 1}

A pattern is a shell pattern for the tensor's name, or numbers of blocks (`7`, `0-7`). Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import AfterValidator, Field

from safecl.config import ConfigError

_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
_BLOCKS = re.compile(r"(\d+)(?:-(\d+))?")
_BEHIND = re.compile(
    r"(?:^|\.)(?:norm|ln_f|final_layer_norm|final_layernorm|lm_head|embed_out|output)\.(?:weight|bias)$"
)


@dataclass(frozen=True)
class Place:
    """A tensor's name, its block (None outside of blocks), and the model's number of blocks."""

    name: str
    block: int | None
    num_blocks: int

    @property
    def depth(self) -> float:
        """Place between the first block (0) and the last (1). An embedding has 0, the last norm and the head have 1."""
        if self.block is None:
            return 1.0 if _BEHIND.search(self.name) else 0.0
        return self.block / max(1, self.num_blocks - 1)


def places_of(names: Iterable[str]) -> dict[str, Place]:
    """Return the place of each tensor of a model."""
    blocks = {name: int(found[1]) if (found := _BLOCK.search(name)) else None for name in names}
    num_blocks = 1 + max((block for block in blocks.values() if block is not None), default=-1)
    return {name: Place(name, block, num_blocks) for name, block in blocks.items()}


Number = Annotated[float, Field(ge=-1e6, le=1e6)]
Gradient = Annotated[list[Number], Field(min_length=2)]
Value = Number | Gradient


def _with_readable_patterns(value: float | list[float] | dict[str, Value]) -> float | list[float] | dict[str, Value]:
    if isinstance(value, dict) and not value:
        raise ValueError('no pattern in it; write e.g. {"*.mlp.*": 0.3, "*": 0.5}')
    return value


Coefficient = Annotated[Value | dict[str, Value], AfterValidator(_with_readable_patterns)]
"""A number, a list over the blocks, or either by pattern; see the module."""


def value_at(coefficient: float | list[float] | dict[str, float | list[float]], place: Place) -> float:
    """Return a coefficient's value for a tensor. Raises ConfigError where it has patterns and none
    matches."""
    if isinstance(coefficient, dict):
        found = next((value for pattern, value in coefficient.items() if _matches(pattern, place)), None)
        if found is None:
            raise ConfigError(f'no pattern of {", ".join(coefficient)} matches {place.name}; end with "*"')
        coefficient = found
    return _along(coefficient, place.depth) if isinstance(coefficient, list) else coefficient


def _matches(pattern: str, place: Place) -> bool:
    if found := _BLOCKS.fullmatch(pattern):
        first, last = int(found[1]), int(found[2] or found[1])
        return place.block is not None and first <= place.block <= last
    return fnmatchcase(place.name, pattern)


def _along(values: list[float], depth: float) -> float:
    """Interpolate linearly between values that stand at equal distances."""
    position = depth * (len(values) - 1)
    left = min(int(position), len(values) - 2)
    return values[left] + (position - left) * (values[left + 1] - values[left])
