"""Types that all back ends of the ties family share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Trim(NamedTuple):
    """Which entries of a task vector are kept: those above the threshold in magnitude, and of those equal to it the
    first `num_equal` in order. A threshold of 0 keeps all."""

    threshold: float
    num_equal: int


class BracketCounts(NamedTuple):
    """Numbers of magnitudes above `high`, equal to it, strictly between, and equal to `low` (0 where low is high)."""

    num_above: int
    num_high: int
    num_between: int
    num_low: int


@dataclass(frozen=True)
class ElectionArguments:
    """The checked arguments of `elected_sum_`: fp32 tensors of one length, as many weights and trims as vectors."""

    target: Tensor
    vectors: list[Tensor]
    weights: list[float]
    trims: list[Trim]
    scale: float
    normalize: bool
    subtract: bool
