"""Work on whole matrices that the shards cut up: each is gathered on one rank, its owner, worked on there, and handed
back.

Owners take turns, so what the work keeps of each matrix is spread over the ranks. A matrix costs one reduction and, to
write it, one broadcast in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from safecl.engine.zero.shards import ShardMap
from safecl.methods.context import TensorPart

Read = Callable[[TensorPart], torch.Tensor]
Work = Callable[[str, torch.Tensor], torch.Tensor]
Write = Callable[[TensorPart, torch.Tensor], None]


def map_matrices(
    shard_map: ShardMap,
    parts: Sequence[TensorPart],
    names: Sequence[str],
    read: Read,
    work: Work,
    write: Write | None = None,
) -> None:
    """Do `work` with each named matrix on its owner; see safecl.methods.context.Run.map_matrices. A collective call.

    parts: those of all shards of this rank.
    """
    rank, world_size, device = dist.get_rank(), dist.get_world_size(), shard_map.engine.device
    for number, name in enumerate(names):
        own, owner = [part for part in parts if part.name == name], number % world_size
        shape = shard_map.shapes[name]
        whole = torch.zeros(shape, dtype=torch.float32, device=device)
        for part in own:
            _slice(whole, part).copy_(read(part))
        if world_size > 1 and not shard_map.replicated:
            dist.reduce(whole, owner)
        if rank == owner:
            whole = work(name, whole).contiguous()
        if write is None:
            continue
        if world_size > 1:
            dist.broadcast(whole, owner)
        for part in own:
            write(part, _slice(whole, part).to(part.shard.param.device))


def _slice(whole: torch.Tensor, part: TensorPart) -> torch.Tensor:
    return whole.view(-1)[part.offset : part.offset + part.where.stop - part.where.start]
