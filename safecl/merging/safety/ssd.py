"""Selective synaptic dampening: shrinks the weights that harmful rows need far more than all rows do.

    theta <- min(lambda I / I_harmful, 1) theta    where I_harmful > alpha I          (elementwise)

I and I_harmful are the diagonal Fisher information of the tuned model on all rows and on the rows to be forgotten:
harmful prompts with the answers that it should not give. Source: Foster, Schoepf and Brintrup, Fast machine unlearning
without retraining through selective synaptic dampening, AAAI 2024, arXiv 2308.07707. The files are taken as they are,
without a common scale: both need the same estimator. Ours: tied weights are shrunk once; alpha by pattern says which
layers may be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from safecl.config import ConfigError
from safecl.merging import base
from safecl.merging.places import Coefficient

if TYPE_CHECKING:
    import torch


class Config(base.MergeConfig):
    """Weights that harmful rows need, shrunk."""

    needs: ClassVar[base.Needs] = base.Needs(base="no", most=1)

    fisher: str
    """I: a safetensors file with the Fisher information of the tuned model on all rows, or on the rows to be kept: one
    value per weight, by the weights' names, as `safecl fisher` writes them."""
    harmful_fisher: str
    """I_harmful: such a file for the harmful rows."""
    alpha: Coefficient = 10.0
    """Ratio of I_harmful to I above which a weight is shrunk; larger ones shrink fewer weights."""
    strength: Annotated[float, Field(ge=0)] = 1.0
    """lambda: factor of I / I_harmful in a shrunk weight. 0 sets it to zero; no weight ever grows."""


class Merge(base.Merge[Config]):
    by_rows = True

    def prepare(self) -> None:
        from safecl.merging.models.fisher import open_fisher

        tuned, names = self.models.tuned[0], self.models.places
        self.kept = open_fisher(self.config.fisher, tuned, names)
        self.harmful = open_fisher(self.config.harmful_fisher, tuned, names)
        self.shrunk, self.elements = 0, 0

    def combine(self, tensors: base.Tensors) -> torch.Tensor:
        import torch

        from safecl.merging.models.fisher import read_fisher

        values, alpha = tensors.tuned[0], tensors.value(self.config.alpha)
        if alpha < 0:
            raise ConfigError(f"ssd.alpha: {alpha:g} for {tensors.name}; a ratio is at least 0")
        stop = tensors.start + len(values) if values.dim() else None
        kept, harmful = (read_fisher(file, tensors.name, tensors.start, stop) for file in (self.kept, self.harmful))
        chosen = harmful > alpha * kept
        factor = kept.mul_(self.config.strength).div_(harmful).clamp_(max=1)
        self.shrunk += int((chosen & (factor < 1)).sum())
        self.elements += values.numel()
        return values.mul_(torch.where(chosen, factor, 1.0))

    def notes(self) -> list[str]:
        return [f"{self.shrunk} of {self.elements} weights were shrunk ({self.shrunk / max(1, self.elements):.3%})"]
