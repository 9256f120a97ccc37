"""The items of a memory plan, with their bytes, place and time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from safecl.config import RunConfig

FP32 = 4
"""Bytes of an fp32 value."""

Where = Literal["device", "host"]

Moment = Literal["always", "backward", "reduce", "step", "evaluation"]
"""The time of an item: always, while activations exist, while gradients are reduced, in the optimizer's step, in an
evaluation."""


@dataclass(frozen=True)
class Item:
    """Something that takes memory: on a rank's device, or in host memory for each rank or once per node."""

    what: str
    where: Where
    nbytes: int
    moment: Moment = "always"
    per_node: bool = False


def share_of(count: int, world_size: int) -> int:
    """Return the number of elements in a rank's shard."""
    return -(-count // world_size)


def weight_bytes(config: RunConfig) -> int:
    """Return the bytes of a weight of the live model."""
    return 2 if config.model.dtype == "bf16" else FP32
