"""Pieces of a shard and its state, which the optimizer's pass works on one after the other.

The place of the state (safecl.engine.zero.placement) decides the pieces:

    beside the shard            one piece, the whole tensor
    the reference store         on the CPU the store's own memory, one piece per parameter; on a GPU chunks, copied in
    host memory, shard on GPU   chunks, copied in, and out again where the pass writes them

Chunks pass through two device buffers: while the pass works on one, a stream of its own fills the other, and a third
stream carries written state back. A pass that only reads the weights can be made aside, in a fourth stream, while the
next forward and backward pass compute. Padding of a shard is in no piece of the store: its weights and gradients stay
0.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from safecl.engine.reference.store import ReferenceStore
from safecl.engine.zero.shards import Fragment
from safecl.kernels import Segments

CHUNK = 1 << 24
"""Elements of a chunk; two device buffers of each kind hold that many."""


@dataclass(frozen=True)
class Served:
    """State of one shard that is read from the reference store."""

    store: ReferenceStore
    fragments: Sequence[Fragment]

    @property
    def dtype(self) -> torch.dtype:
        return self.store.dtype

    def parts(self, begin: int, end: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """(slice of the shard, the store's own memory) of all fragments in elements [begin, end) of the shard."""
        for fragment in self.fragments:
            low, high = max(begin, fragment.start), min(end, fragment.start + fragment.length)
            if low < high:
                first = fragment.offset + low - fragment.start
                yield slice(low, high), self.store.tensor(fragment.name).view(-1)[first : first + high - low]

    def copy_to(self, target: torch.Tensor, begin: int) -> None:
        """Fill `target` with the shard's elements from `begin` on; padding is 0, as it is in the weights."""
        parts = list(self.parts(begin, begin + target.numel()))
        if sum(values.numel() for _, values in parts) < target.numel():
            target.zero_()
        for where, values in parts:
            target[where.start - begin : where.stop - begin].copy_(values, non_blocking=self.store.pinned)

    def copy_for(self, param: torch.Tensor) -> torch.Tensor:
        """Return the state as a tensor of its own beside the shard `param`."""
        copied = torch.empty(param.shape, dtype=self.store.dtype, device=param.device)
        self.copy_to(copied.view(-1), 0)
        return copied


@dataclass
class Hosted:
    """State of one shard in host memory."""

    tensor: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def copy_to(self, target: torch.Tensor, begin: int) -> None:
        target.copy_(self.tensor.view(-1)[begin : begin + target.numel()], non_blocking=True)

    def copy_from(self, source: torch.Tensor, begin: int) -> None:
        self.tensor.view(-1)[begin : begin + source.numel()].copy_(source, non_blocking=True)


@dataclass
class Piece:
    """A slice of the flat shard and its state there, on the shard's device, by kind."""

    where: slice
    state: dict[str, torch.Tensor]

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This slice of a tensor with the shard's layout."""
        return tensor.detach().view(-1)[self.where]

    def of_table(self, table: Segments | None) -> Segments | None:
        """This slice of the shard's segments."""
        return None if table is None else table.slice(self.where.start, self.where.stop)


class ShardParts(Protocol):
    """The part of safecl.engine.zero.shard.Shard that `pieces` needs."""

    param: torch.Tensor
    state: dict[str, torch.Tensor]
    served: dict[str, Served]
    stream: Stream

    def is_streamed(self, kind: str) -> bool: ...


def pieces(shard: ShardParts, kinds: Sequence[str], written: Collection[str] = ()) -> Iterator[Piece]:
    """Yield the shard in pieces that have state of all `kinds`.

    Kinds in `written` that are not kept beside the shard are copied back after each piece.
    """
    served = {kind: shard.served[kind] for kind in kinds if kind in shard.served}
    if any(shard.is_streamed(kind) for kind in kinds):
        hosted = {kind: Hosted(shard.state[kind]) for kind in kinds if kind not in served and shard.is_streamed(kind)}
        yield from shard.stream.pieces(shard, kinds, {**served, **hosted}, written)
    elif served:  # the shard is in host memory itself, so only served state is not beside it
        yield from _parameter_by_parameter(shard, kinds, served)
    else:
        yield Piece(slice(0, shard.param.numel()), {kind: shard.state[kind].view(-1) for kind in kinds})


def _parameter_by_parameter(shard: ShardParts, kinds: Sequence[str], away: dict[str, Served]) -> Iterator[Piece]:
    first, *others = away.values()
    assert all(other.fragments is first.fragments for other in others), "all that is served has the shard's own layout"
    for where, _ in first.parts(0, shard.param.numel()):
        state = {kind: shard.state[kind].view(-1)[where] for kind in kinds if kind not in away}
        for kind, served in away.items():
            (_, state[kind]), *_ = served.parts(where.start, where.stop)
        yield Piece(where, state)


@dataclass
class Stream:
    """Two device buffers for each kind of state that is not beside its shard, and the streams that fill and empty them.
    All shards of a rank share them: the first chunk of one comes in while the pass works on the last chunk of another.
    """

    device: torch.device
    longest: int
    """Elements of the longest shard."""
    chunk: int = CHUNK
    _buffers: dict[tuple[str, torch.dtype], list[torch.Tensor]] = field(default_factory=dict)
    _chunks: int = 0
    _passed: set[int] = field(default_factory=set)
    """Shards, by id, of which a pass has begun since the streams last waited for each other."""

    @functools.cached_property
    def _lanes(self) -> _Lanes:
        return _Lanes(self.device)

    def pieces(
        self, shard: ShardParts, kinds: Sequence[str], away: Mapping[str, Served | Hosted], written: Collection[str]
    ) -> Iterator[Piece]:
        """Yield the shard in chunks; `away` is the state that is not beside the shard, by kind."""
        lanes, numel = self._lanes, shard.param.numel()
        buffers = {kind: self._pair(kind, source) for kind, source in away.items()}
        starts = range(0, numel, self.chunk)
        first, self._chunks = self._chunks, self._chunks + len(starts)

        def fetch(number: int) -> None:
            start, slot = starts[number], (first + number) % 2
            with lanes.filling(slot):
                for kind, source in away.items():
                    source.copy_to(buffers[kind][slot][: min(self.chunk, numel - start)], start)

        self._begin(shard)
        fetch(0)
        for number, start in enumerate(starts):
            slot, where = (first + number) % 2, slice(start, min(start + self.chunk, numel))
            if number + 1 < len(starts):
                fetch(number + 1)
            near = {kind: pair[slot][: where.stop - start] for kind, pair in buffers.items()}
            beside = {kind: shard.state[kind].view(-1)[where] for kind in kinds if kind not in away}
            with lanes.working(slot):
                yield Piece(where, near | beside)
            with lanes.emptying(slot):
                for kind in away.keys() & set(written):
                    target = away[kind]
                    assert isinstance(target, Hosted), "the reference store is not written to"
                    target.copy_from(near[kind], start)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Make the passes in the block after the work that the current stream has so far, and beside what it gets from
        then on. Until `join` or `settle` nothing may change the weights, nor state that these passes write."""
        with self._lanes.aside():
            yield

    def join(self) -> None:
        """Let the current stream wait for the passes that were made aside."""
        self._lanes.join()

    def settle(self) -> None:
        """Return when all written state is in host memory, and no pass that was made aside reads the weights."""
        self._lanes.settle()

    def _begin(self, shard: ShardParts) -> None:
        """Order this pass behind an earlier one of the same shard, whose written state it reads."""
        if not self._passed or id(shard) in self._passed:
            self._lanes.begin()
            self._passed.clear()
        self._passed.add(id(shard))

    def _pair(self, kind: str, source: Served | Hosted) -> list[torch.Tensor]:
        dtype, length = source.dtype, min(self.chunk, self.longest)
        if (kind, dtype) not in self._buffers:
            self._passed.clear()  # memory that the current stream may still use has become a buffer
            self._buffers[kind, dtype] = [torch.empty(length, dtype=dtype, device=self.device) for _ in range(2)]
        return self._buffers[kind, dtype]


class _Lanes:
    """Orders filling, working on and emptying two buffers, by CUDA streams and events.

    On the CPU calls are done when they return, and there is nothing to order.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        if self.cuda:
            self._in, self._out, self._aside = (torch.cuda.Stream(device) for _ in range(3))
            self._filled, self._worked, self._emptied = ([torch.cuda.Event() for _ in range(2)] for _ in range(3))

    def begin(self) -> None:
        """Wait for state that the current stream has written, and for state that the pass before still carries
        back."""
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

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        if not self.cuda:
            yield
            return
        self._aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._aside):
            yield

    def join(self) -> None:
        if self.cuda:
            torch.cuda.current_stream().wait_stream(self._aside)

    def settle(self) -> None:
        if self.cuda:
            self._out.synchronize()
