"""Drives a merge over the tensors: the passes, and the result a few rows at a time.

Memory: the values of one tensor in every model, in fp32, and as much again for what the merge forms of them: two of the
largest tensors per model. Merges that work by rows need a part of that: pieces of 16 MiB per model. Besides, the blocks
on their way to the disk, and one block per open model: PIECES + 1 of 16 MiB per model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from safecl.merging.base import Merge, MergeConfig, Models, Tensors, Unmergeable, Weights

PIECE_ELEMENTS = 2**20
"""fp32 elements of each model in one piece of a merge by rows: 4 MiB."""

Progress = Callable[[int], None]
"""Called with a number of elements that are done."""


def nothing(done: int) -> None:
    """Report no progress."""


@torch.no_grad()
def run_passes(merge: Merge[MergeConfig], models: Models, progress: Progress = nothing) -> None:
    """Prepare the merge, and let it observe all tensors as often as it wants to."""
    merge.prepare()
    for number in range(merge.num_passes):
        for name in models.places:
            for tensors in _pieces(merge, models, name):
                merge.observe(tensors, number)
                progress(tensors.tuned[0].numel())
        merge.end_pass(number)


@torch.no_grad()
def merged_rows(merge: Merge[MergeConfig], models: Models, name: str) -> Iterator[torch.Tensor]:
    """Yield the result's values of one tensor in order, as fp32 tensors of some rows each.

    Raises ConfigError where they are not finite, or a coefficient has no value for the tensor.
    """
    for tensors in _pieces(merge, models, name):
        shape = tensors.tuned[0].shape
        result = merge.combine(tensors)
        assert result.shape == shape and result.dtype == torch.float32, f"{name}: combine returns fp32 of its shape"
        if not math.isfinite(float(result.sum())) and not bool(result.isfinite().all()):
            raise Unmergeable(f"{name}: the merged values are not finite; use smaller coefficients")
        yield result


def merged_tensor(merge: Merge[MergeConfig], models: Models, name: str) -> torch.Tensor:
    """Return the result's values of one tensor: fp32, whole."""
    rows = list(merged_rows(merge, models, name))
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _pieces(merge: Merge[MergeConfig], models: Models, name: str) -> Iterator[Tensors]:
    shape = models.tuned[0].shapes[name]
    num_rows = shape[0] if shape else 1
    step = num_rows
    if merge.by_rows and shape:
        step = max(1, PIECE_ELEMENTS // max(1, math.prod(shape[1:])))
    for start in range(0, max(1, num_rows), max(1, step)):
        yield _read(models, name, start, min(start + step, num_rows))


def _read(models: Models, name: str, start: int, stop: int) -> Tensors:
    def values(model: Weights) -> torch.Tensor:
        return model.read(name, start, stop)

    return Tensors(
        place=models.places[name],
        tuned=[values(model) for model in models.tuned],
        base=values(models.base) if models.base is not None else None,
        aligned=values(models.aligned) if models.aligned is not None else None,
        start=start,
    )
