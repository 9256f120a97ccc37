"""Finds values in a run's sharded state that are not finite, by kind and parameter."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from safecl.distributed import collectives
from safecl.engine.zero.optimizer import ShardAdamW
from safecl.engine.zero.shards import ShardMap
from safecl.kernels.finite import count_nonfinite

WEIGHTS = "weights"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class NonFinite:
    """Values of one kind of state that are NaN or infinite.

    kind: `weights`, or a kind of the optimizer's state. count: over the whole model. parameter: the first that holds
    one, in the model's order. ranks: those whose part of the state holds one.
    """

    kind: str
    count: int
    parameter: str
    ranks: tuple[int, ...]


def nonfinite_state(shards: ShardMap, optimizer: ShardAdamW, kinds: Collection[str] | None = None) -> list[NonFinite]:
    """Return what is not finite in the master weights and the state, by kind; empty where all is finite.

    A collective call, which reads all of it once. kinds: those to look at, all by default; temporary ones, whose names
    begin with an underscore, are left out.
    """
    known = {kind for shard in optimizer.shards() for kind in (*shard.state, *shard.served) if kind[0] != "_"}
    wanted = [kind for kind in (WEIGHTS, *sorted(known)) if kinds is None or kind in kinds]
    own = [(collectives.rank(), *found) for kind in wanted for found in _of_kind(shards, optimizer, kind)]
    everywhere = collectives.gather_objects(own)
    return [_joined(shards, kind, of_kind) for kind in wanted if (of_kind := [e for e in everywhere if e[1] == kind])]


def _of_kind(shards: ShardMap, optimizer: ShardAdamW, kind: str) -> list[tuple[str, str, int]]:
    """(kind, parameter, number of values that are not finite) of this rank's part."""
    tensors = shards.flats if kind == WEIGHTS else optimizer.tensors(kind)
    counts = [(f.name, count_nonfinite(shards.view(f, tensors))) for f in shards.fragments]
    return [(kind, name, count) for name, count in counts if count]


def _joined(shards: ShardMap, kind: str, found: list[tuple[int, str, str, int]]) -> NonFinite:
    """Add the ranks' parts up; replicas of the same state count once."""
    ranks = tuple(sorted({rank for rank, *_ in found}))
    by_rank = [sum(count for rank, _, _, count in found if rank == each) for each in ranks]
    holding = {name for _, _, name, _ in found}
    first = next(name for name in shards.shapes if name in holding)
    return NonFinite(kind, max(by_rank) if shards.replicated else sum(by_rank), first, ranks)
