"""Pieces of the state that the optimizer's pass works on, one after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from safecl.engine.reference.store import ReferenceStore
    from safecl.engine.zero.shards import Fragment

CHUNK = 1 << 24
"""Elements of a chunk; two device buffers of each kind hold that many."""


@dataclass(frozen=True)
class Served:
    """State of one shard that is read from the reference store."""

    store: ReferenceStore
    fragments: Sequence[Fragment]

    def parts(self, begin: int, end: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """(where in the shard, the store's own memory) of all that lies in elements [begin, end) of the shard."""
        for fragment in self.fragments:
            low, high = max(begin, fragment.start), min(end, fragment.start + fragment.length)
            if low < high:
                first = fragment.offset + low - fragment.start
                yield slice(low, high), self.store.tensor(fragment.name).view(-1)[first : first + high - low]

    def copy_to(self, target: torch.Tensor, begin: int) -> None:
        """Fills `target` with what the shard's elements from `begin` on are; padding is 0, as it is in the weights."""
        parts = list(self.parts(begin, begin + target.numel()))
        if sum(values.numel() for _, values in parts) < target.numel():
            target.zero_()
        for where, values in parts:
            target[where.start - begin : where.stop - begin].copy_(values, non_blocking=self.store.pinned)


@dataclass
class Hosted:
    """State of one shard in host memory."""

    tensor: torch.Tensor

    def copy_to(self, target: torch.Tensor, begin: int) -> None:
        target.copy_(self.tensor.view(-1)[begin : begin + target.numel()], non_blocking=True)

    def copy_from(self, source: torch.Tensor, begin: int) -> None:
        self.tensor.view(-1)[begin : begin + source.numel()].copy_(source, non_blocking=True)


@dataclass
class Piece:
    """A stretch of the shard and its state there, on the shard's device, by kind."""

    where: slice
    state: dict[str, torch.Tensor]


def pieces(shard, kinds: Sequence[str], written: Collection[str] = ()) -> Iterator[Piece]:
    """The shard in pieces that hold all of `kinds`. What of `written` is not beside the shard is carried back after
    each piece."""
    param, away = shard.param, {}
    for kind in kinds:
        if kind in shard.served:
            away[kind] = shard.served[kind]
        elif shard.state[kind].device != param.device:
            away[kind] = Hosted(shard.state[kind])
    if not away:
        yield Piece(slice(0, param.numel()), {kind: shard.state[kind].view(-1) for kind in kinds})
    elif param.is_cuda:
        yield from shard.stream.pieces(shard, kinds, away, written)
    else:
        yield from _parameter_by_parameter(shard, kinds, away)


def _parameter_by_parameter(shard, kinds: Sequence[str], away: dict[str, Served]) -> Iterator[Piece]:
    first, *others = away.values()
    assert all(other.fragments is first.fragments for other in others), "all that is served has the shard's own layout"
    for where, _ in first.parts(0, shard.param.numel()):
        state = {kind: shard.state[kind].view(-1)[where] for kind in kinds if kind not in away}
        for kind, served in away.items():
            (_, state[kind]), *_ = served.parts(where.start, where.stop)
        yield Piece(where, state)


@dataclass
class Stream:
    """Two device buffers for each kind of state that is away, and the streams that fill and empty them. Made once per
    shard."""

    device: torch.device
    chunk: int = CHUNK
    _buffers: dict[tuple[str, torch.dtype], list[torch.Tensor]] = field(default_factory=dict)
    _lanes: _Lanes | None = None

    def pieces(
        self, shard, kinds: Sequence[str], away: dict[str, Served | Hosted], written: Collection[str]
    ) -> Iterator[Piece]:
        self._lanes = self._lanes or _Lanes(self.device)
        lanes, numel = self._lanes, shard.param.numel()
        buffers = {kind: self._pair(kind, source, min(self.chunk, numel)) for kind, source in away.items()}
        starts = range(0, numel, self.chunk)

        def fetch(number: int) -> None:
            start, slot = starts[number], number % 2
            with lanes.filling(slot):
                for kind, source in away.items():
                    source.copy_to(buffers[kind][slot][: min(self.chunk, numel - start)], start)

        lanes.begin()
        fetch(0)
        for number, start in enumerate(starts):
            slot, where = number % 2, slice(start, min(start + self.chunk, numel))
            if number + 1 < len(starts):
                fetch(number + 1)
            near = {kind: pair[slot][: where.stop - start] for kind, pair in buffers.items()}
            with lanes.working(slot):
                yield Piece(
                    where, near | {kind: shard.state[kind].view(-1)[where] for kind in kinds if kind not in away}
                )
            with lanes.emptying(slot):
                for kind in away.keys() & set(written):
                    away[kind].copy_from(near[kind], start)

    def settle(self) -> None:
        """Returns when all that was written is in host memory."""
        if self._lanes is not None:
            self._lanes.settle()

    def _pair(self, kind: str, source: Served | Hosted, length: int) -> list[torch.Tensor]:
        dtype = source.store.dtype if isinstance(source, Served) else source.tensor.dtype
        if (kind, dtype) not in self._buffers:
            self._buffers[kind, dtype] = [torch.empty(length, dtype=dtype, device=self.device) for _ in range(2)]
        return self._buffers[kind, dtype]


class _Lanes:
    """Order between filling, working on and emptying two buffers: CUDA streams and events, or nothing on the CPU, where
    calls are done when they return."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        if self.cuda:
            self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)
            self._filled, self._worked, self._emptied = ([torch.cuda.Event() for _ in range(2)] for _ in range(3))

    def begin(self) -> None:
        """What this pass reads may have been written on the current stream, or be still on its way out from the pass
        before."""
        if self.cuda:
            self._in.wait_stream(torch.cuda.current_stream())
            self._in.wait_stream(self._out)

    @contextlib.contextmanager
    def filling(self, slot: int) -> Iterator[None]:
        if not self.cuda:
            yield
            return
        with torch.cuda.stream(self._in):
            self._in.wait_event(self._emptied[slot])
            yield
            self._filled[slot].record(self._in)

    @contextlib.contextmanager
    def working(self, slot: int) -> Iterator[None]:
        if self.cuda:
            torch.cuda.current_stream().wait_event(self._filled[slot])
        yield
        if self.cuda:
            self._worked[slot].record(torch.cuda.current_stream())

    @contextlib.contextmanager
    def emptying(self, slot: int) -> Iterator[None]:
        if not self.cuda:
            yield
            return
        with torch.cuda.stream(self._out):
            self._out.wait_event(self._worked[slot])
            yield
            self._emptied[slot].record(self._out)

    def settle(self) -> None:
        if self.cuda:
            self._out.synchronize()
