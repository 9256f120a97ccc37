"""A rank's flat part of the trained weights with its gradient and state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from safecl.engine.zero.pieces import Piece, Served, Stream, pieces
from safecl.engine.zero.placement import Placement, allocate
from safecl.kernels import Segments
from safecl.kernels.pages import use_huge_pages


@dataclass
class Shard:
    """One flat tensor of trained weights with its gradient and its state, all of one layout."""

    param: torch.Tensor  # fp32, 1-D (stage 0: the parameter's own shape)
    state: dict[str, torch.Tensor]
    segments: Segments | None = None
    """Stretches whose weight decay (or penalty strength) differs from the group's."""
    placement: Placement = field(default_factory=Placement)
    served: dict[str, Served] = field(default_factory=dict)
    """Kinds of state that equal the reference weights and are read from their store."""
    _pages_settled: bool = False

    @property
    def grad(self) -> torch.Tensor:
        return self.param.grad

    @functools.cached_property
    def stream(self) -> Stream:
        return Stream(self.param.device)

    def settle_pages(self) -> None:
        """Before the first step: what the pass goes through from now on lies in huge pages, whoever has allocated
        it."""
        if not self._pages_settled:
            self._pages_settled = True
            for tensor in (self.param, self.grad, *self.state.values()):
                use_huge_pages(tensor)

    def pieces(self, kinds: Sequence[str], written: Collection[str] = ()) -> Iterator[Piece]:
        """The shard in pieces with its state of these kinds, wherever that lives; the pieces' tensors are on the
        shard's device, and what is changed in those of `written` is kept. Slices refer to the flat shard,
        `param.view(-1)`."""
        return pieces(self, kinds, written)

    def keep(self, kind: str, values: torch.Tensor) -> None:
        """Makes `values` (the shard's layout) the state `kind`, in the place and dtype where that kind is kept."""
        place, dtype = self.placement.of(kind), self.placement.dtype(kind, values.dtype)
        self.served.pop(kind, None)
        known = self.state.get(kind)
        if known is None or known.dtype != dtype:
            known = self.state[kind] = allocate(self.param, dtype, place)
        known.copy_(values)


Quantity = Callable[[Shard], torch.Tensor]
"""Something with one value per weight: the gradient, a state."""
