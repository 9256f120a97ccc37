"""SafeLoRA: projects what tuning has changed onto the direction of alignment, in the layers that left it.

    V = W_aligned - W_base,    C = V V^T / |V|_F,    D = W_tuned - W_aligned
    W = W_aligned + C D    where cos(C D, D) <= threshold,    W_tuned elsewhere

For matrices of the blocks; all other tensors stay as tuned. Source: Hsu et al., SafeLoRA, arXiv 2405.16833, whose code
projects the factor B of an adapter, which is the same: C (B A) = (C B) A, so the rank stays. `number` is that code's
default, the 10 matrices of the lowest cosines. Ours: whole models as well; pairs by name; a matrix that alignment has
not changed stays as tuned, where the formula divides by 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from safecl.merging import base
from safecl.merging.places import Coefficient
from safecl.merging.safety._direction import DirectionConfig, check_direction, compare, summary

if TYPE_CHECKING:
    import torch


class Config(DirectionConfig):
    """Tuned change, projected onto the direction of alignment."""

    threshold: Coefficient = 0.5
    """Cosine between a matrix's change and its projection up to which the matrix is projected; -1 leaves it alone, 1
    projects it in any case."""
    number: Annotated[int, Field(ge=1)] | None = None
    """Project this many matrices, those of the lowest cosines, whatever the threshold; reads the models twice."""


class Merge(base.Merge[Config]):
    @property
    def num_passes(self) -> int:
        return 1 if self.config.number is not None else 0

    def prepare(self) -> None:
        check_direction(self.models)
        self.cosines: dict[str, float] = {}
        self.chosen: set[str] = set()
        self.treated = 0

    def observe(self, tensors: base.Tensors, number: int) -> None:
        if (compared := compare(tensors)) is not None:
            self.cosines[tensors.name] = compared.cosine

    def end_pass(self, number: int) -> None:
        self.chosen = set(sorted(self.cosines, key=lambda name: self.cosines[name])[: self.config.number])

    def combine(self, tensors: base.Tensors) -> torch.Tensor:
        compared = compare(tensors)
        if compared is None:
            return tensors.tuned[0]
        self.cosines[tensors.name] = compared.cosine
        if not self._is_projected(tensors, compared.cosine):
            return tensors.tuned[0]
        self.treated += 1
        return tensors.needed_aligned.add_(compared.projected)

    def _is_projected(self, tensors: base.Tensors, cosine: float) -> bool:
        if self.config.number is not None:
            return tensors.name in self.chosen
        return cosine <= tensors.value(self.config.threshold)

    def notes(self) -> list[str]:
        return summary(self.cosines, self.treated, "were projected")
