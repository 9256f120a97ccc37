"""The host memory through which a rank's state reaches its file, bounded whatever the state's size.

State that fits is copied at once, and training goes on while a thread writes it. Larger state passes through two
buffers of half the size each, one of which is filled while the other is written; training then waits until the last
bytes are copied, hence for the disk.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator

import torch

from safecl.kernels import page_locked

_ALIGNMENT = 4096  # a multiple of every dtype's size: no element lies in two buffers


class Staging:
    """One or two buffers. `fill` is for the thread of the training, `blocks` and `abandon` for the thread that
    writes."""

    def __init__(self, limit: int, *, locked: bool):
        """limit: bytes that the buffers take at most, at least 8 KiB. locked: page-locked for copies from a GPU."""
        self._half = max(1, limit // 2 // _ALIGNMENT) * _ALIGNMENT
        self._limit, self._locked = max(limit, 2 * self._half), locked
        self._buffers: list[torch.Tensor] = []
        self._start()

    def begin(self, num_bytes: int) -> None:
        """Prepare for `num_bytes`. Buffers of the save before are used again where they have the right sizes."""
        sizes = [num_bytes] if num_bytes <= self._limit else [self._half] * 2
        if [buffer.numel() for buffer in self._buffers] != sizes:
            self._buffers.clear()  # frees the old ones before the new ones are made
            make = page_locked.empty if self._locked else torch.empty
            self._buffers = [make((size,), dtype=torch.uint8) for size in sizes]
        self._start()

    def _start(self) -> None:
        self._empty: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[torch.Tensor | BaseException | None] = queue.SimpleQueue()
        self._abandoned = False
        for buffer in self._buffers:
            self._empty.put(buffer)

    def fill(self, num_bytes: int, copy: Callable[[int, int, torch.Tensor], None]) -> None:
        """Pass bytes [0, num_bytes) on, and return when the last are copied. `copy(low, high, target)` fills a uint8
        target with bytes [low, high). Returns early where the writer has given up."""
        position = 0
        try:
            while position < num_bytes:
                buffer = self._empty.get()
                if self._abandoned:
                    return
                end = min(position + buffer.numel(), num_bytes)
                copy(position, end, buffer[: end - position])
                self._full.put(buffer[: end - position])
                position = end
        except BaseException as error:
            self._full.put(error)
            raise
        self._full.put(None)

    def blocks(self) -> Iterator[memoryview]:
        """Yield the bytes in order, each block valid until the next. Raises the error of `fill`."""
        while (block := self._full.get()) is not None:
            if isinstance(block, BaseException):
                raise block
            yield block.numpy().data
            self._empty.put(block._base if block._base is not None else block)

    def abandon(self) -> None:
        """Let `fill` return, since nobody reads any more."""
        self._abandoned = True
        self._empty.put(torch.empty(0, dtype=torch.uint8))

    def free(self) -> None:
        """Give the buffers back."""
        self._buffers.clear()
        self._start()

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.numel() for buffer in self._buffers)


def staging_bytes(state_bytes: int, limit: int) -> int:
    """Return the bytes that the buffers take for `state_bytes` of state: what `Staging` makes, for the memory plan."""
    half = max(1, limit // 2 // _ALIGNMENT) * _ALIGNMENT
    return min(state_bytes, 2 * half) if state_bytes > max(limit, 2 * half) else state_bytes
