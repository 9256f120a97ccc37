"""Drives a merge over the tensors: the passes, and the result a few rows at a time.

Memory: see `memory_bound`. Values lie in memory for one tensor at a time, in every model, in fp32; merges that work by
rows hold 4 MiB of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from safecl.merging.base import Merge, MergeConfig, Models, Tensors, Unmergeable, Weights
from safecl.storage.durable import BLOCK_BYTES
from safecl.storage.sizes import give_back_freed_memory

PIECE_ELEMENTS = 2**20
"""fp32 elements of each model in one piece of a merge by rows: 4 MiB."""

FREED_BYTES = 32 * 2**20
"""Freed buffers that the allocator may keep."""

Progress = Callable[[int], None]
"""Called with a number of elements that are done."""


def nothing(done: int) -> None:
    """Report no progress."""


def memory_bound(num_models: int, largest: int, by_rows: bool) -> int:
    """Return the bytes that a merge takes at most, besides the libraries.

    largest: number of elements of the largest tensor. Two of the largest tensors per model, or of the pieces of a merge
    by rows; one block per model for reading and three on the way to the disk; and what the allocator keeps.
    """
    elements = min(largest, PIECE_ELEMENTS) if by_rows else largest
    return 2 * num_models * 4 * elements + (num_models + 3) * BLOCK_BYTES + FREED_BYTES


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
        del tensors
        yield result
        del result


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
        tensors = read_tensors(models, name, start, min(start + step, num_rows))
        merge.freed += models.num * tensors.tuned[0].nbytes
        yield tensors
        del tensors  # before the next ones are read
        if merge.freed > FREED_BYTES:
            give_back_freed_memory()
            merge.freed = 0


def read_tensors(models: Models, name: str, start: int = 0, stop: int | None = None) -> Tensors:
    """Read rows [start, stop) of one tensor in all models, fp32."""

    def values(model: Weights) -> torch.Tensor:
        return model.read(name, start, stop)

    return Tensors(
        place=models.places[name],
        tuned=[values(model) for model in models.tuned],
        base=values(models.base) if models.base is not None else None,
        aligned=values(models.aligned) if models.aligned is not None else None,
        start=start,
    )
