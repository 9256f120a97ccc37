"""Stream the weights of a model's units to the device, one unit after the other.

A unit is a set of weights that are needed together: a decoder layer, or a slice of the head. Weights are in host memory
(safecl.engine.reference.store). There are two buffers: on a GPU a side stream copies unit i + 1 into one while unit i
computes from the other. On the CPU units are used where they are, or through two buffers, so that tests run the same
code.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Literal

import torch

Unit = dict[str, torch.Tensor]
"""Weights by name."""
WeightPlacement = Literal["streamed", "resident", "in place"]
"""Through two buffers of the largest unit's size; all copied to the device once; or not copied (the device is the
host)."""

_ALIGNMENT = 256


class WeightStream:
    """Yields the units of a model, in any order, as tensors on `device`. A unit is valid until the next one is taken.

    units: host tensors.
    """

    def __init__(self, units: Sequence[Unit], device: torch.device, placement: WeightPlacement):
        self.units, self.device, self.placement = list(units), device, placement
        self.num_copied_bytes = 0
        """Bytes of weights that were copied to the device since the start."""
        self._resident = [self._copied(unit) for unit in self.units] if placement == "resident" else None
        self._slots: list[_Slot] = []
        self._stream: torch.cuda.Stream | None = None
        if placement == "streamed":
            self._slots = [_Slot(max(map(unit_bytes, self.units)), device) for _ in range(2)]
            if device.type == "cuda":
                self._stream = torch.cuda.Stream(device)
                # Kernels that were queued before may still use the memory that the buffers got.
                self._stream.wait_stream(torch.cuda.current_stream(device))

    @property
    def buffer_bytes(self) -> int:
        """Device memory that weights take."""
        return sum(slot.memory.numel() for slot in self._slots) + sum(unit_bytes(unit) for unit in self._resident or ())

    def _copied(self, unit: Unit) -> Unit:
        self.num_copied_bytes += unit_bytes(unit)
        return {name: tensor.to(self.device, copy=True) for name, tensor in unit.items()}

    def run(self, order: Sequence[int]) -> Generator[Unit, None, None]:
        """Yield the units of `order`. During the last one the first is fetched again, since the next pass most likely
        begins with it."""
        if self.placement != "streamed":
            yield from ((self._resident or self.units)[number] for number in order)
            return
        if not order:
            return
        slot = self._fetch(order[0], keep=None)
        for place in range(len(order)):
            following = self._fetch(order[(place + 1) % len(order)], keep=slot)
            slot.wait()
            try:
                yield slot.unit
            finally:
                slot.release()
            slot = following

    def _fetch(self, number: int, keep: _Slot | None) -> _Slot:
        """Return the slot that has this unit, or begin to copy it into one that is not `keep`."""
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
    """One of the two buffers. On a GPU events order the side stream's copies and the kernels that read them."""

    def __init__(self, num_bytes: int, device: torch.device):
        self.memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.number: int | None = None
        self.unit: Unit = {}
        self._events = (torch.cuda.Event(), torch.cuda.Event()) if device.type == "cuda" else None
        """(copy has arrived, buffer is released)"""

    def fill(self, number: int, unit: Unit, stream: torch.cuda.Stream | None) -> None:
        self.number, self.unit = number, self._views(unit)
        if stream is None or self._events is None:
            self._copy(unit)
            return
        arrived, released = self._events
        with torch.cuda.stream(stream):
            stream.wait_event(released)
            self._copy(unit)
            arrived.record(stream)

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
        """Make the current stream wait for this buffer's copy."""
        if self._events is not None:
            torch.cuda.current_stream(self.memory.device).wait_event(self._events[0])

    def release(self) -> None:
        """Let the buffer be overwritten once the current stream has done its work."""
        if self._events is not None:
            self._events[1].record(torch.cuda.current_stream(self.memory.device))
