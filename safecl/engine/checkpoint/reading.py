"""Reads this rank's part of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import torch

from safecl.engine.zero.shards import Fragment, ShardMap
from safecl.storage.durable import BLOCK_BYTES, read_into


def own_fragments(shards: ShardMap, rank: int, world_size: int) -> Iterator[Fragment]:
    """What this rank writes: its own shards, or its part of replicated ones."""
    if not shards.replicated:
        yield from shards.fragments
        return
    begin, end, position = shards.numel * rank // world_size, shards.numel * (rank + 1) // world_size, 0
    for f in shards.fragments:
        low, high = max(begin - position, 0), min(end - position, f.length)
        if low < high:
            yield Fragment(f.name, f.offset + low, high - low, f.flat, f.start + low)
        position += f.length


def read_elements(file: BinaryIO, position: int, target: torch.Tensor) -> None:
    if target.device.type == "cpu":
        read_into(file, position, _bytes_of(target))
        return
    chunk = BLOCK_BYTES // target.element_size()
    buffer = torch.empty(min(chunk, target.numel()), dtype=target.dtype)
    for start in range(0, target.numel(), chunk):
        part = target[start : start + chunk]
        read_into(file, position + start * target.element_size(), _bytes_of(buffer[: part.numel()]))
        part.copy_(buffer[: part.numel()])


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy())
