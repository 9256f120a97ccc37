"""SafeMERGE: merges a tuned model with a safe one in the layers that deviate from the direction of alignment.

    V = W_aligned - W_base,    C = V V^T / |V|_F,    D = W_tuned - W_aligned
    W = W_aligned + w_tuned D + w_safe (W_safe - W_aligned)    where cos(C D, D) < threshold,    W_tuned elsewhere

The safe model is the aligned one after tuning on harmful prompts with safe answers; without a second tuned model it is
the aligned model itself, and its term is 0. For matrices of the blocks; all other tensors stay as tuned. Source:
Djuhera et al., SafeMERGE, arXiv 2503.17239; threshold and weights are its defaults. Ours: dense changes, where the
authors' code adds the factors of adapters apart (peft's `linear`); whole models as well; pairs by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from safecl.merging import base
from safecl.merging.places import Coefficient
from safecl.merging.safety._direction import DirectionConfig, check_direction, compare, summary

if TYPE_CHECKING:
    import torch


class Config(DirectionConfig):
    """Merge of the layers that deviate from the direction of alignment."""

    needs: ClassVar[base.Needs] = base.Needs(base="yes", aligned="yes", most=2)

    threshold: Coefficient = 0.35
    """Cosine between a matrix's change and its projection under which the matrix is merged; -1 leaves it alone, 1
    merges it in any case."""
    tuned_weight: Coefficient = 0.8
    """w_tuned: weight of the first tuned model's change."""
    safe_weight: Coefficient = 0.2
    """w_safe: weight of the change of the safe model, the second tuned one."""


class Merge(base.Merge[Config]):
    def prepare(self) -> None:
        check_direction(self.models)
        self.cosines: dict[str, float] = {}
        self.treated = 0

    def combine(self, tensors: base.Tensors) -> torch.Tensor:
        compared = compare(tensors)
        if compared is None:
            return tensors.tuned[0]
        self.cosines[tensors.name] = compared.cosine
        if compared.cosine >= tensors.value(self.config.threshold):
            return tensors.tuned[0]
        self.treated += 1
        aligned, safe = tensors.needed_aligned, tensors.tuned[1:]
        merged = compared.change.mul_(tensors.value(self.config.tuned_weight)).add_(aligned)
        if safe:
            merged.add_(safe[0].sub_(aligned), alpha=tensors.value(self.config.safe_weight))
        return merged

    def notes(self) -> list[str]:
        return summary(self.cosines, self.treated, "were merged")
