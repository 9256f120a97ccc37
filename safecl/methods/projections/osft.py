"""OSFT, orthogonal subspace fine-tuning with adaptive SVD (Nayak et al. 2025, "Sculpting Subspaces", arXiv 2504.07097).

    W = U S V^T = U_hi S_hi V_hi^T + U_lo S_lo V_lo^T          once per task, for every matrix of a decoder layer
    d <- (I - U_hi U_hi^T) d (I - V_hi V_hi^T)                 d: the step of W
    rank of U_hi, V_hi = (low + I_l (high - low)) min(m, n),   I_l = cos(input, output) of layer l / mean of all layers

The directions with the largest singular values hold what the model knows, and no step moves them. The authors train
U_lo, S_lo and V_lo as separate factors with projected gradients; here W stays whole, and the step that AdamW has taken
is projected on the same subspaces, so that momentum and decay cannot leave them. Both agree to first order in the step.
The cosine of a layer's input and output is measured on the memory's rows: a layer that changes little is kept more.

The step of each matrix is gathered on one rank, which has its singular vectors, and sent back: one reduction and one
broadcast of the matrices, in fp32, in each step. A rank keeps the vectors of its share of the matrices, in fp32: those
of the kept or of the free subspace, whichever are fewer. The weights at the task's start are kept, so that a resumed
run finds the same vectors. Norms, embeddings and the head are trained freely.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, model_validator

from safecl.config import MethodConfig
from safecl.config.base import Change
from safecl.methods import base

if TYPE_CHECKING:
    import torch

START, DRAW = "osft_anchor", base.ReplayTerm("osft", ce_weight=1.0, share=1.0)
_LAYER = re.compile(r"\.(\d+)\.")


class Config(MethodConfig):
    """OSFT: steps stay outside of the subspaces of the largest singular values."""

    needs_memory: ClassVar[bool] = True
    changes: ClassVar[Change] = Change("step", "tensors")
    state_kinds: ClassVar[tuple[str, ...]] = (START, base.BEFORE)
    refuses_lora: ClassVar[str] = (
        "it keeps the singular vectors of the full matrices; tune all weights (model.lora: null), or project the "
        "adapters' gradients (safe_anchor)"
    )

    low: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of a matrix's singular vectors that is kept in a layer without importance (the paper's mrr)."""
    high: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Share that is kept in a layer of average importance (the paper's trr)."""

    @property
    def kept_singular_share(self) -> float:
        return self.high  # the importance of all layers has mean 1

    @model_validator(mode="after")
    def _low_is_lower(self) -> Config:
        if self.low > self.high:
            raise ValueError(f"low ({self.low:g}) is above high ({self.high:g})")
        return self


class Projector:
    """The projection of a matrix's step, [m, n], out of its kept subspaces."""

    def __init__(self, weight: torch.Tensor, share: float):
        import torch

        rank = round(share * min(weight.shape))
        u, _, vh = torch.linalg.svd(weight, full_matrices=True)
        self.left, self.right = _Side(u, rank), _Side(vh.T, rank)

    def project(self, step: torch.Tensor) -> torch.Tensor:
        return self.right.free(self.left.free(step).T).T


class _Side:
    """A kept subspace of the columns of a matrix: its basis, or that of the free subspace where that has fewer
    vectors."""

    def __init__(self, vectors: torch.Tensor, rank: int):
        self.keeps = 2 * rank <= vectors.shape[1]
        self.basis = (vectors[:, :rank] if self.keeps else vectors[:, rank:]).contiguous()

    def free(self, columns: torch.Tensor) -> torch.Tensor:
        inside = self.basis @ (self.basis.T @ columns)
        return columns - inside if self.keeps else inside


class Method(base.Method[Config]):
    def __init__(self, name: str, config: Config):
        super().__init__(name, config)
        self._shares: list[float] = []
        """Kept share of each decoder layer."""
        self._projectors: dict[str, Projector] | None = None
        """Those of the matrices that this rank owns; None until they are needed, also after a resume."""

    def start_task(self, run: base.Run) -> None:
        similarities = run.layer_similarities(DRAW)
        mean = sum(similarities) / len(similarities)
        low, high = self.config.low, self.config.high
        self._shares = [min(1.0, max(0.0, low + s / mean * (high - low))) for s in similarities]
        self._projectors = None
        run.set_anchor(START)
        run.log(f"osft: layers keep {min(self._shares):.0%} to {max(self._shares):.0%} of their singular vectors")

    def transform_step(self, run: base.Run, shards: Sequence[base.Shard]) -> None:
        names = [name for name in run.matrix_names() if self._layer(name) is not None]
        if self._projectors is None:
            self._projectors = {}
            run.map_matrices(shards, names, _start, self._keep)
        run.map_matrices(shards, names, _step, self._projected, _take)

    def state_dict(self) -> dict[str, Any]:
        return {"_shares": self._shares}

    def _layer(self, name: str) -> int | None:
        """The number of the decoder layer that a matrix belongs to."""
        found = _LAYER.search(name)
        return int(found[1]) if found is not None and int(found[1]) < len(self._shares) else None

    def _keep(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        layer = self._layer(name)
        assert layer is not None and self._projectors is not None
        self._projectors[name] = Projector(weight, self._shares[layer])
        return weight

    def _projected(self, name: str, step: torch.Tensor) -> torch.Tensor:
        assert self._projectors is not None
        return self._projectors[name].project(step)


def _start(part: base.TensorPart) -> torch.Tensor:
    """The elements of a part at the task's start, wherever they are kept."""
    import torch

    low, high = part.where.start, part.where.stop
    found = [
        piece.state[START][
            max(low, piece.where.start) - piece.where.start : min(high, piece.where.stop) - piece.where.start
        ]
        .float()
        .clone()
        for piece in part.shard.pieces([START])
        if max(low, piece.where.start) < min(high, piece.where.stop)
    ]
    return torch.cat(found)


def _step(part: base.TensorPart) -> torch.Tensor:
    return base.step_of(part.shard).view(-1)[part.where]


def _take(part: base.TensorPart, step: torch.Tensor) -> None:
    """Take this step from the old weights."""
    before = part.shard.state[base.BEFORE].view(-1)[part.where]
    part.shard.param.view(-1)[part.where].copy_(before.to(step.device) + step)
