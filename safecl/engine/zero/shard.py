"""A rank's flat part of the trained weights, with its gradient and state."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from safecl.engine.zero.pieces import Piece, Served, Stream, pieces
from safecl.engine.zero.placement import StatePlacement, allocate
from safecl.kernels import Segments
from safecl.kernels.pages import use_huge_pages


@dataclass(eq=False)
class Shard:
    """One flat tensor of trained weights with its gradient and its state, all of one layout.

    Methods see it as safecl.methods.context.Shard.
    """

    param: torch.Tensor  # fp32, 1-D (stage 0: the parameter's own shape)
    state: dict[str, torch.Tensor]
    stream: Stream
    """The way of state that is not beside the shard; all shards of a rank share it."""
    segments: Segments | None = None
    """Segments whose weight decay differs from the group's."""
    placement: StatePlacement = field(default_factory=StatePlacement)
    served: dict[str, Served] = field(default_factory=dict)
    """State that equals the reference weights and is read from their store, by kind."""
    _pages_settled: bool = False

    @property
    def has_grad(self) -> bool:
        return self.param.grad is not None

    @property
    def grad(self) -> torch.Tensor:
        """fp32, the shape of `param`; inside an optimizer step only."""
        assert self.param.grad is not None, "a shard has a gradient inside the optimizer's step only"
        return self.param.grad

    def settle_pages(self) -> None:
        """Put all tensors that the optimizer's pass reads into huge pages, once, before the first step."""
        if not self._pages_settled:
            self._pages_settled = True
            for tensor in (self.param, self.grad, *self.state.values()):
                use_huge_pages(tensor)

    def is_streamed(self, kind: str) -> bool:
        """True where state of this kind passes through device buffers: the shard is on a GPU, and the state is not."""
        return self.param.is_cuda and (kind in self.served or self.state[kind].device != self.param.device)

    def pieces(self, kinds: Sequence[str], written: Collection[str] = ()) -> Iterator[Piece]:
        """Yield the shard in pieces with its state of these kinds, from any place.

        The pieces' tensors are on the shard's device; changes to kinds in `written` are kept. Slices refer to the flat
        shard, `param.view(-1)`.
        """
        return pieces(self, kinds, written)

    def keep(self, kind: str, values: torch.Tensor) -> None:
        """Make `values` (of the shard's layout) the state `kind`, in the place and dtype of that kind."""
        place, dtype = self.placement.of(kind), self.placement.dtype(kind, values.dtype)
        self.served.pop(kind, None)
        known = self.state.get(kind)
        if known is None or known.dtype != dtype:
            known = self.state[kind] = allocate(self.param, dtype, place)
        known.copy_(values)


Action = Callable[[list[Shard]], None]
"""Work on the shards inside the optimizer's step, where they have gradients."""
