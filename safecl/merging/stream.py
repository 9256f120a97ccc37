"""Drives a merge over the tensors: the passes, and the result a few rows at a time.

Memory: see safecl.merging.memory. Values lie in memory for one tensor at a time, in every model, in fp32, and for the
next one, which is read meanwhile; merges that work by rows hold 4 MiB of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from safecl.merging.base import Merge, MergeConfig, Models, Tensors, Unmergeable, Weights
from safecl.merging.memory import FREED_BYTES, PIECE_ELEMENTS
from safecl.storage.sizes import give_back_freed_memory

Progress = Callable[[int], None]
"""Called with a number of elements that are done."""


def nothing(done: int) -> None:
    """Report no progress."""


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of a tensor."""

    name: str
    start: int
    stop: int


def pieces_of(merge: Merge[MergeConfig], models: Models, name: str) -> Iterator[Piece]:
    """Yield the pieces in which a merge wants a tensor: the whole, or some rows each."""
    shape = models.tuned[0].shapes[name]
    num_rows = shape[0] if shape else 1
    step = num_rows
    if merge.by_rows and shape:
        step = max(1, PIECE_ELEMENTS // max(1, math.prod(shape[1:])))
    for start in range(0, max(1, num_rows), max(1, step)):
        yield Piece(name, start, min(start + step, num_rows))


Read = Callable[[Piece], Tensors]
"""Returns the values of a piece in all models, in memory that the next but one piece may be read into."""


class ReadAhead:
    """Reads pieces in a known order, each in a thread of its own while the one before is worked on. Call it with the
    pieces in that order.

    models: those whose tensors are read by no other thread meanwhile. begin: called with each piece before it is read.
    Nothing is read before the first piece is asked for. Raises what reading raises, when the piece is asked for.
    """

    def __init__(self, models: Models, pieces: Iterable[Piece], begin: Callable[[Piece], None] = lambda piece: None):
        self._models, self._pieces, self._begin = models, iter(pieces), begin
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read ahead")
        self._next: tuple[Piece, Future[Tensors]] | None = None

    def __call__(self, piece: Piece) -> Tensors:
        if self._next is None:
            self._advance()
        assert self._next is not None and self._next[0] == piece, f"{piece} is not the next one"
        tensors = self._next[1].result()
        self._advance()
        return tensors

    def close(self) -> None:
        """Wait for the reading thread, and drop what it has read."""
        self._next = None
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _advance(self) -> None:
        piece = next(self._pieces, None)
        self._next = None if piece is None else (piece, self._pool.submit(self._read, piece))

    def _read(self, piece: Piece) -> Tensors:
        self._begin(piece)
        return read_tensors(self._models, piece.name, piece.start, piece.stop)


@torch.no_grad()
def run_passes(
    merge: Merge[MergeConfig], models: Models, progress: Progress = nothing, read: Read | None = None
) -> None:
    """Prepare the merge, and let it observe all tensors as often as it wants to. read: by default from the models."""
    merge.prepare()
    for number in range(merge.num_passes):
        for name in models.places:
            for tensors in _tensors(merge, models, name, read):
                merge.observe(tensors, number)
                progress(tensors.tuned[0].numel())
        merge.end_pass(number)


@torch.no_grad()
def merged_rows(
    merge: Merge[MergeConfig], models: Models, name: str, read: Read | None = None
) -> Iterator[torch.Tensor]:
    """Yield the result's values of one tensor in order, as fp32 tensors of some rows each.

    read: by default from the models. Raises ConfigError where the values are not finite, or a coefficient has no value
    for the tensor.
    """
    for tensors in _tensors(merge, models, name, read):
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


def _tensors(merge: Merge[MergeConfig], models: Models, name: str, read: Read | None) -> Iterator[Tensors]:
    for piece in pieces_of(merge, models, name):
        tensors = read(piece) if read else read_tensors(models, name, piece.start, piece.stop)
        merge.freed += models.num * tensors.tuned[0].nbytes if read is None else 0
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
