"""Weights of one unit of a model after the other on the device: two buffers, the next unit copied while this one is
used.

A unit is what is needed together: a decoder layer, or a slice of the head. Weights lie in host memory
(safecl.engine.reference.store). On a GPU a side stream copies unit i + 1 while unit i computes; on the CPU units are
used where they are, or, to test the same code, through two buffers of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch

Unit = dict[str, torch.Tensor]
"""Weights by name."""
Placement = Literal["streamed", "resident", "in place"]

_ALIGNMENT = 256


class WeightStream:
    """Gives the units of a model, in any order, as tensors on `device`; what it gave is valid until the next is asked
    for.

    units: host tensors. placement: `streamed` through two buffers of the largest unit's size; `resident`, all copied
    once; `in place`, not copied at all (the device is the host).
    """

    def __init__(self, units: Sequence[Unit], device: torch.device, placement: Placement):
        self.units, self.device, self.placement = list(units), device, placement
        self.num_copied_bytes = 0
        """Bytes of weights that went to the device since the start."""
        self._resident = [self._copied(unit) for unit in self.units] if placement == "resident" else None
        self._slots: list[_Slot] = []
        self._stream: torch.cuda.Stream | None = None
        if placement == "streamed":
            self._slots = [_Slot(max(map(unit_bytes, self.units)), device) for _ in range(2)]
            if device.type == "cuda":
                self._stream = torch.cuda.Stream(device)
                self._stream.wait_stream(
                    torch.cuda.current_stream(device)
                )  # earlier kernels may still use the buffers' memory

    @property
    def buffer_bytes(self) -> int:
        """Device memory that weights take."""
        return sum(slot.memory.numel() for slot in self._slots) + sum(unit_bytes(unit) for unit in self._resident or ())

    def _copied(self, unit: Unit) -> Unit:
        self.num_copied_bytes += unit_bytes(unit)
        return {name: tensor.to(self.device, copy=True) for name, tensor in unit.items()}

    def run(self, order: Sequence[int]) -> Iterator[Unit]:
        """The units of `order` one after the other. While the last is used the first is fetched again: most likely it
        comes next."""
        if self.placement != "streamed":
            yield from ((self._resident or self.units)[number] for number in order)
            return
        slot = self._fetch(order[0], keep=None) if order else None
        for place in range(len(order)):
            following = self._fetch(order[(place + 1) % len(order)], keep=slot)
            slot.wait()
            try:
                yield slot.unit
            finally:
                slot.release()
            slot = following

    def _fetch(self, number: int, keep: _Slot | None) -> _Slot:
        """The slot that holds this unit, or will; `keep` is not overwritten."""
        for slot in self._slots:
            if slot.number == number:
                return slot
        slot = next(slot for slot in self._slots if slot is not keep)
        slot.fill(number, self.units[number], self._stream)
        self.num_copied_bytes += unit_bytes(self.units[number])
        return slot


def unit_bytes(unit: Unit) -> int:
    """Bytes of a unit in a buffer, alignment included."""
    return sum(_padded(tensor) for tensor in unit.values())


def _padded(tensor: torch.Tensor) -> int:
    return math.ceil(tensor.numel() * tensor.element_size() / _ALIGNMENT) * _ALIGNMENT


class _Slot:
    """One of the two buffers. On a GPU events order the copies on the side stream and the kernels that read."""

    def __init__(self, num_bytes: int, device: torch.device):
        self.memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.number: int | None = None
        self.unit: Unit = {}
        on_gpu = device.type == "cuda"
        self._arrived, self._released = (torch.cuda.Event() if on_gpu else None for _ in range(2))

    def fill(self, number: int, unit: Unit, stream: torch.cuda.Stream | None) -> None:
        self.number, self.unit = number, self._views(unit)
        if stream is None:
            self._copy(unit)
            return
        with torch.cuda.stream(stream):
            stream.wait_event(self._released)
            self._copy(unit)
            self._arrived.record(stream)

    def _copy(self, unit: Unit) -> None:
        for name, tensor in unit.items():
            self.unit[name].copy_(tensor, non_blocking=True)

    def _views(self, unit: Unit) -> Unit:
        views, position = {}, 0
        for name, tensor in unit.items():
            size = tensor.numel() * tensor.element_size()
            views[name] = self.memory[position : position + size].view(tensor.dtype).view(tensor.shape)
            position += _padded(tensor)
        return views

    def wait(self) -> None:
        """What is queued from now on finds the weights."""
        if self._arrived is not None:
            torch.cuda.current_stream(self.memory.device).wait_event(self._arrived)

    def release(self) -> None:
        """What has been queued so far is the last to read them."""
        if self._released is not None:
            self._released.record(torch.cuda.current_stream(self.memory.device))
