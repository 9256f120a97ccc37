"""The items of a memory plan: how many bytes lie where, and when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from safecl.config import RunConfig

FP32 = 4


RANKS_PER_NODE = 8


Where = Literal["device", "host"]


Moment = Literal["always", "backward", "reduce", "step"]
"""When something is there: all the time, while activations are, when gradients are reduced, in the optimizer's step."""


@dataclass(frozen=True)
class Item:
    """Something that takes memory: on one rank's device, in host memory for one rank, or in host memory once per
    node."""

    what: str
    where: Where
    nbytes: int
    moment: Moment = "always"
    per_node: bool = False


def share_of(count: int, world_size: int) -> int:
    """Elements of a rank's shard."""
    return -(-count // world_size)


def weight_bytes(config: RunConfig) -> int:
    return 2 if config.model.dtype == "bf16" else FP32
