"""Where the state of a shard lives, and how a pass over the shard sees it in pieces that are on the shard's device.

    beside the shard            one piece, the whole tensor
    the reference store         the anchor while it equals theta_0: nothing is kept per rank. On the CPU the pieces are the store's own
                                memory, one per parameter; on a GPU they are chunks, copied in
    host memory, shard on GPU   chunks, copied in and, where the pass writes them, out again

Chunks pass through two device buffers: while one is worked on, the next is filled on a stream of its own, and what was
written leaves on a third. Padding of a shard is in no piece of the store: its weights and gradients are 0 and stay so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from safecl.kernels.pages import use_huge_pages

Place = Literal["none", "cpu"]


@dataclass(frozen=True)
class Placement:
    """Where each role of state lives (`none`: beside the shard), and the dtype in which Fisher information is kept."""

    reference: Place = "none"
    fisher: Place = "none"
    ema: Place = "none"
    fisher_dtype: torch.dtype = torch.float32

    def of(self, kind: str) -> Place:
        role = role_of(kind)
        return getattr(self, role) if role is not None else "none"

    def dtype(self, kind: str, wanted: torch.dtype) -> torch.dtype:
        return self.fisher_dtype if role_of(kind) == "fisher" else wanted


def role_of(kind: str) -> str | None:
    """reference, fisher or ema by the end of a kind's name; None for moments and for what is temporary (a leading
    underscore)."""
    if kind.startswith("_"):
        return None
    return next(
        (role for end, role in (("anchor", "reference"), ("fisher", "fisher"), ("ema", "ema")) if kind.endswith(end)),
        None,
    )


def allocate(param: torch.Tensor, dtype: torch.dtype, place: Place) -> torch.Tensor:
    """Zeros of the shard's shape, beside it or in host memory, which is page-locked where there is a GPU to copy to."""
    if place == "cpu" or not param.is_cuda:
        state = torch.zeros(param.shape, dtype=dtype, pin_memory=torch.cuda.is_available())
        use_huge_pages(state)
        return state
    return torch.zeros(param.shape, dtype=dtype, device=param.device)
