"""SafeAnchor's subspaces (Guo, Wu & Yiu 2026, arXiv 2604.17691): gradients leave out the directions that the memory's
Fisher information is largest in.

    F_l  = 1/n sum_i r_il r_il^T          r_il: gradient of the CE of the i-th draw from the memory, tensor l, flattened
    g_l <- g_l - sum_j (g_l . b_lj) b_lj  b_l1, ..., b_lk: the eigenvectors of F_l with the largest eigenvalues

F_l is never formed. Its eigenvectors are combinations of the n gradients, b_j = sum_i v_ij r_i / ||sum_i v_ij r_i||,
where the v_j are the eigenvectors of the n x n matrix of their dot products, so the subspaces of all tensors cost one
all-reduce of n (n + 1) / 2 numbers a tensor. The projection costs one of k numbers a tensor in each step, and k fp32
values per weight; the estimate holds n of them for a moment. Directions with an eigenvalue below 1e-6 of the largest
are left out.

The paper trains adapters and also replays when a monitor of safety falls: combine it with `corrective_replay`, which
has one. Fresh adapters have B = 0, where the gradient of A vanishes and its subspace is empty: set `renew` with LoRA.
`project: step` projects the step that AdamW has taken, which the gradient's projection does not bind.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from safecl.config import MethodConfig
from safecl.config.base import Change
from safecl.methods import base

if TYPE_CHECKING:
    import torch

SMALLEST_EIGENVALUE = 1e-6
"""Relative to a tensor's largest."""


def basis(number: int) -> str:
    """Kind of the state that holds the basis vector of this number."""
    return f"safe_anchor_{number}"


class Config(MethodConfig):
    """SafeAnchor: gradients are projected out of the subspaces that matter most for the memory."""

    needs_memory: ClassVar[bool] = True

    rank: Annotated[int, Field(ge=1)] = 8
    """Dimensions of the subspace of each tensor."""
    samples: Annotated[int, Field(ge=1)] = 16
    """Draws from the memory whose gradients the subspaces are estimated from."""
    share: Annotated[float, Field(gt=0)] = 0.25
    """Tokens of each of these draws, as a share of the task's tokens in a step."""
    renew: Annotated[int, Field(ge=1)] | None = None
    """Steps between two estimates; null: once, before the first task."""
    project: Literal["gradient", "step"] = "gradient"
    """What is projected: the gradient before AdamW, as in the paper, or the step that AdamW has taken. `step` keeps the
    old weights during a step, 4 more bytes per weight."""

    @model_validator(mode="after")
    def _samples_span_the_subspace(self) -> Config:
        if self.samples < self.rank:
            raise ValueError(f"samples ({self.samples}) span at most as many dimensions; rank is {self.rank}")
        return self

    @property
    def gradient_passes(self) -> float:
        return self.samples / self.renew if self.renew is not None else 0

    @property
    def changes(self) -> Change:
        return Change(self.project, "tensors")

    @property
    def state_kinds(self) -> tuple[str, ...]:
        return (*map(basis, range(self.rank)), *((base.BEFORE,) if self.project == "step" else ()))


class Method(base.Method[Config]):
    def before_step(self, run: base.Run) -> None:
        renew = self.config.renew
        if not run.has_state(basis(0)) or (renew is not None and run.step % renew == 0):
            self._estimate(run)

    def transform_gradient(self, run: base.Run, shards: Sequence[base.Shard]) -> None:
        if self.config.project == "gradient" and run.has_state(basis(0)):
            self._project(run, shards, _grad)

    def transform_step(self, run: base.Run, shards: Sequence[base.Shard]) -> None:
        if run.has_state(basis(0)):
            self._project(run, shards, base.step_of)

    def _project(self, run: base.Run, shards: Sequence[base.Shard], direction: base.Quantity) -> None:
        """Take the part inside the subspaces out of a direction: from the gradient, or from the weights after the
        step."""
        bases = [_state(basis(number)) for number in range(self.config.rank)]
        factors = run.dots_per_tensor(shards, [(direction, vector) for vector in bases])  # fp64 [rank, tensors]
        for part in run.parts(shards):
            target = part.shard.grad if direction is _grad else part.shard.param
            for number, vector in enumerate(bases):
                values = vector(part.shard).view(-1)[part.where]
                target.view(-1)[part.where].sub_(values, alpha=float(factors[number, part.number]))

    # ---------------------------------------------------------------------------------------------------- the estimate

    def _estimate(self, run: base.Run) -> None:
        """Make the basis vectors from gradients of the memory at the current weights."""
        shards, kinds = run.shards(), [f"_safe_anchor_{number}" for number in range(self.config.samples)]
        kinds = [kind for kind in kinds if run.memory_gradient(kind, self._draw(kind))]
        if not kinds:
            run.log(f"safe_anchor: step {run.step}: no gradient of the memory is finite, nothing is projected")
            return
        vectors = self._eigenvectors(run, shards, kinds)  # fp64 [tensors, samples, rank]
        for shard in shards:
            for number in range(self.config.rank):
                shard.keep(basis(number), shard.state[kinds[0]] * 0)
        for part in run.parts(shards):
            gradients = [part.shard.state[kind].view(-1)[part.where] for kind in kinds]
            for number, gradient in itertools.product(range(self.config.rank), range(len(kinds))):
                own = part.shard.state[basis(number)].view(-1)[part.where]
                own.add_(gradients[gradient], alpha=float(vectors[part.number, gradient, number]))
        for shard, kind in itertools.product(shards, kinds):
            del shard.state[kind]

    def _draw(self, kind: str) -> base.ReplayTerm:
        return base.ReplayTerm(kind.lstrip("_"), ce_weight=1.0, share=self.config.share)

    def _eigenvectors(self, run: base.Run, shards: Sequence[base.Shard], kinds: Sequence[str]) -> torch.Tensor:
        """Factors of the gradients in the basis vectors of each tensor, fp64 [tensors, samples, rank]; 0 for directions
        that the gradients do not span."""
        import torch

        pairs = list(itertools.combinations_with_replacement(range(len(kinds)), 2))
        products = run.dots_per_tensor(shards, [(_state(kinds[i]), _state(kinds[j])) for i, j in pairs])
        gram = torch.zeros(products.shape[1], len(kinds), len(kinds), dtype=torch.float64)
        for (i, j), values in zip(pairs, products, strict=True):
            gram[:, i, j] = gram[:, j, i] = values
        eigenvalues, eigenvectors = torch.linalg.eigh(gram)  # in ascending order
        eigenvalues, eigenvectors = eigenvalues.flip(-1), eigenvectors.flip(-1)
        largest = eigenvectors.gather(1, eigenvectors.abs().argmax(1, keepdim=True))
        eigenvectors = eigenvectors * largest.sign()  # else each layout could choose a sign of its own
        spanned = eigenvalues > SMALLEST_EIGENVALUE * eigenvalues[:, :1].clamp_min(1e-30)
        factors = torch.where(spanned, eigenvalues.clamp_min(1e-60).rsqrt(), torch.zeros_like(eigenvalues))
        rank = self.config.rank
        found = torch.zeros(len(gram), len(kinds), rank, dtype=torch.float64)
        found[:, :, : len(kinds)] = (eigenvectors * factors[:, None, :])[:, :, :rank]
        return found


def _grad(shard: base.Shard) -> torch.Tensor:
    return shard.grad


def _state(kind: str) -> base.Quantity:
    return lambda shard: shard.state[kind]
