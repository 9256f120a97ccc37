"""Places of a shard's state: beside the shard, in host memory, or in the reference store.

The store serves an anchor while it equals theta_0; then no rank keeps it. safecl.engine.zero.pieces shows how a pass
over the shard reads state from each place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from safecl.distributed import devices
from safecl.kernels import page_locked
from safecl.kernels.pages import use_huge_pages

Place = Literal["none", "cpu"]


@dataclass(frozen=True)
class StatePlacement:
    """The place of each role of state (`none`: beside the shard), and the dtype of Fisher information."""

    reference: Place = "none"
    fisher: Place = "none"
    ema: Place = "none"
    fisher_dtype: torch.dtype = torch.float32

    def of(self, kind: str) -> Place:
        """The place of state of this kind."""
        places: dict[str | None, Place] = {"reference": self.reference, "fisher": self.fisher, "ema": self.ema}
        return places.get(role_of(kind), "none")

    def dtype(self, kind: str, wanted: torch.dtype) -> torch.dtype:
        """The dtype in which values of this kind are kept; `wanted` is the dtype of the values."""
        return self.fisher_dtype if role_of(kind) == "fisher" else wanted


def role_of(kind: str) -> str | None:
    """Return reference, fisher or ema, by the end of the kind's name; None for moments and for temporary state, whose
    names begin with an underscore."""
    if kind.startswith("_"):
        return None
    roles = {"anchor": "reference", "fisher": "fisher", "ema": "ema"}
    return next((role for end, role in roles.items() if kind.endswith(end)), None)


def allocate(param: torch.Tensor, dtype: torch.dtype, place: Place) -> torch.Tensor:
    """Return zeros of the shard's shape, beside it or in host memory, which is page-locked where there is a GPU."""
    if place == "cpu" or not param.is_cuda:
        if devices.on_gpu():
            return page_locked.zeros(param.shape, dtype)
        state = torch.zeros(param.shape, dtype=dtype)
        use_huge_pages(state)
        return state
    return torch.zeros(param.shape, dtype=dtype, device=param.device)
