"""Merges the weights of a finished task with the aligned model's, shard by shard.

The aligned weights are the state `aligned_anchor`, which the reference store serves; the task's are the shards, or the
average where the run saves it. Kinds of safecl.merging that work element by element are given pieces of parameters as
1-D tensors, so nothing is communicated, in any ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from safecl.config.base import MergeAtTheEnd
from safecl.engine.zero.shards import Fragment
from safecl.merging.base import Merge, MergeConfig, Models, Tensors
from safecl.merging.places import places_of
from safecl.merging.registry import kind_module, read_settings
from safecl.training.steps.state import RunState

ALIGNED, AVERAGE = "aligned_anchor", "ema"
CHUNK = 1 << 24
"""Elements that are merged at a time."""


def merges_of(run: RunState) -> list[MergeAtTheEnd]:
    """Return the merges at the end of the current task."""
    settings = (method.config.merge_at_the_end for method in run.active_methods)
    return [merge for merge in settings if merge is not None]


def merge_as_set(run: RunState) -> None:
    """Do the merges whose settings are fixed. A collective call."""
    for merge in merges_of(run):
        if merge.pick is None:
            EndMerge(run, merge).apply({})


class EndMerge:
    """One merge of the weights that the run saves. keep: hold what is merged in host memory, so that `apply` may be
    called many times; each call starts from it."""

    def __init__(self, run: RunState, merge: MergeAtTheEnd, keep: bool = False):
        self.run, self.merge = run, merge
        self.kind = AVERAGE if run.saves_average else None
        self._kept = [tensor.detach().view(-1).to("cpu", copy=True) for tensor in self._targets()] if keep else None

    def _targets(self) -> list[torch.Tensor]:
        optimizer = self.run.engine.optimizer
        return optimizer.tensors(self.kind) if self.kind else [shard.param for shard in optimizer.shards()]

    @torch.no_grad()
    def apply(self, point: Mapping[str, Any]) -> None:
        """Merge with the settings of one point. A collective call."""
        made = self._made(point)
        places = places_of(self.run.engine.shards.shapes)
        for index, fragment, target, aligned, start in self._parts():
            tuned = target if self._kept is None else self._kept[index][start : start + target.numel()]
            tensors = Tensors(places[fragment.name], [tuned.to(target.device, torch.float32, copy=True)], aligned)
            target.copy_(made.combine(tensors))
        self.run.engine.optimizer.settle()
        if self.kind is None:
            self.run.engine.shards.publish()

    def restore(self) -> None:
        """Put back what was merged. A collective call."""
        assert self._kept is not None, "only a merge that keeps its input can be undone"
        for target, kept in zip(self._targets(), self._kept, strict=True):
            target.detach().view(-1).copy_(kept)
        if self.kind is None:
            self.run.engine.shards.publish()

    def _made(self, point: Mapping[str, Any]) -> Merge[MergeConfig]:
        config = read_settings(self.merge.kind, {**self.merge.settings, **point})
        made: Merge[MergeConfig] = kind_module(self.merge.kind).Merge(config, Models([_Named()], _Named()))
        made.prepare()
        assert made.by_rows and not made.num_passes, "checked when the run was planned"
        return made

    def _parts(self) -> Iterator[tuple[int, Fragment, torch.Tensor, torch.Tensor, int]]:
        """Yield parts of parameters: the shard's number, the fragment, what is merged, the aligned weights in fp32, and
        the first element in the shard."""
        kinds = [ALIGNED] if self.kind is None else [ALIGNED, self.kind]
        fragments = self.run.engine.shards.fragments
        for index, shard in enumerate(self.run.engine.optimizer.shards()):
            own = [fragment for fragment in fragments if fragment.flat == index]
            for piece in shard.pieces(kinds, written=kinds[1:]):
                whole = shard.param.detach().view(-1)[piece.where] if self.kind is None else piece.state[self.kind]
                for fragment, low, high in _overlaps(own, piece.where):
                    here = slice(low - piece.where.start, high - piece.where.start)
                    aligned = piece.state[ALIGNED][here].to(torch.float32, copy=True)  # the store is read-only
                    yield index, fragment, whole[here], aligned, low


def _overlaps(fragments: Sequence[Fragment], where: slice) -> Iterator[tuple[Fragment, int, int]]:
    """Yield the elements of fragments that lie in a slice of the shard, at most CHUNK at a time."""
    for fragment in fragments:
        low, high = max(where.start, fragment.start), min(where.stop, fragment.start + fragment.length)
        for start in range(low, high, CHUNK):
            yield fragment, start, min(start + CHUNK, high)


class _Named:
    """A model of which a merge by elements knows that it is there. Implements safecl.merging.base.Weights."""

    label = "the run"
    shapes: Mapping[str, tuple[int, ...]] = {}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        raise NotImplementedError("weights of a run are merged in pieces of shards")
