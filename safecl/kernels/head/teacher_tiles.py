"""The teacher's logits or outputs for each tile of the student: projected, gathered, or streamed from the host.

Host tensors reach a GPU through two device buffers and a stream of their own, so that the next tile is copied during
the work on this one. A full-vocabulary fp16 cache has 250 KB per token for a vocabulary of 128k tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from safecl.kernels.head.matmul import operand, project


def take(tensor: Tensor, rows: Tensor | None, start: int, end: int) -> Tensor:
    """Return rows ``rows[start:end]`` of a tensor; where ``rows`` is None (all, in order) a view."""
    if rows is None:
        return tensor[start:end]
    return tensor.index_select(0, rows[start:end].to(tensor.device))


def dense_tiles(
    teacher: list[Tensor], compute: torch.dtype, rows: Tensor | None, tiles: list[tuple[int, int]], buffer: Tensor
) -> Iterator[Tensor]:
    """Yield the logits [rows, teacher_vocab] of an online teacher (hidden, weight, [bias]); tiles share ``buffer``."""
    hidden, weight, *bias = teacher
    device = weight.device
    weight = operand(weight, compute)
    for x in row_tiles(hidden, rows, tiles, device):
        yield project(operand(x, compute), weight, bias[0] if bias else None, buffer[: x.shape[0]])


def topk_tiles(
    teacher: list[Tensor], rows: Tensor | None, tiles: list[tuple[int, int]], device: torch.device
) -> Iterator[list[Tensor]]:
    """Yield [log_probs [rows, k], indices [rows, k] int64, log_tail [rows]] of each tile."""
    log_probs, indices, log_tail = teacher
    tensors = [tensor.to(device, non_blocking=True) for tensor in (log_probs, indices.long(), log_tail)]
    for start, end in tiles:
        yield [take(tensor, rows, start, end) for tensor in tensors]


def row_tiles(
    tensor: Tensor, rows: Tensor | None, tiles: list[tuple[int, int]], device: torch.device
) -> Iterator[Tensor]:
    """Yield the rows of each tile on ``device``, from a tensor that may be on the host."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        yield from _streamed(tensor, rows, tiles, device)
        return
    for start, end in tiles:
        yield take(tensor, rows, start, end).to(device)


def _streamed(
    host: Tensor, rows: Tensor | None, tiles: list[tuple[int, int]], device: torch.device
) -> Iterator[Tensor]:
    """Yield the rows of each tile through two device buffers, which are filled in turn."""
    tallest = max(end - start for start, end in tiles)
    slots = [_Slot(host, tallest, device) for _ in range(2)]
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch gives it no types
    current = torch.cuda.current_stream(device)
    stream.wait_stream(current)  # earlier kernels may still use the memory that the allocator hands out
    rows = None if rows is None else rows.cpu()
    slots[0].copy(host, rows, *tiles[0], stream)
    for index, (start, end) in enumerate(tiles):
        slot = slots[index % 2]
        if index + 1 < len(tiles):
            slots[(index + 1) % 2].copy(host, rows, *tiles[index + 1], stream)
        current.wait_event(slot.arrived)
        yield slot.device_rows[: end - start]
        slot.consumed.record(current)


class _Slot:
    """One of two device buffers, with a pinned host buffer for rows that are scattered or in pageable memory."""

    def __init__(self, host: Tensor, tallest: int, device: torch.device):
        self.device_rows = torch.empty(tallest, host.shape[1], dtype=host.dtype, device=device)
        self.staging: Tensor | None = None
        self.arrived, self.consumed = _event(), _event()

    def copy(self, host: Tensor, rows: Tensor | None, start: int, end: int, stream: torch.cuda.Stream) -> None:
        source = self._pinned(host, rows, start, end)
        with torch.cuda.stream(stream):
            stream.wait_event(self.consumed)
            self.device_rows[: end - start].copy_(source, non_blocking=True)
            self.arrived.record(stream)

    def _pinned(self, host: Tensor, rows: Tensor | None, start: int, end: int) -> Tensor:
        if rows is None and host.is_pinned():
            return host[start:end]
        if self.staging is None:
            self.staging = torch.empty(self.device_rows.shape, dtype=host.dtype, pin_memory=True)
        self.arrived.synchronize()  # the last copy out of the staging buffer is done
        target = self.staging[: end - start]
        if rows is None:
            return target.copy_(host[start:end])
        return torch.index_select(host, 0, rows[start:end], out=target)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch gives it no types
