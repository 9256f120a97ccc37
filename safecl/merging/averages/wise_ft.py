"""WiSE-FT: a point on the line from the base to the tuned model.

    theta = (1 - alpha) theta_base + alpha theta_tuned

Source: Wortsman et al., Robust fine-tuning of zero-shot models, arXiv 2109.01903. Merging an aligned base with its own
fine-tune lowers the attack success rate without safety data: Farn et al., arXiv 2412.19512.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from safecl.merging import base
from safecl.merging.places import Coefficient

if TYPE_CHECKING:
    import torch


class Config(base.MergeConfig):
    """A point on the line from the base to the tuned model."""

    needs: ClassVar[base.Needs] = base.Needs(base="yes", most=1)
    usual_sweep: ClassVar[str] = "alpha=0:1:0.1"

    alpha: Coefficient = 0.5
    """Share of the tuned model: 0 is the base, 1 the tuned model."""


class Merge(base.Merge[Config]):
    by_rows = True

    def combine(self, tensors: base.Tensors) -> torch.Tensor:
        return tensors.needed_base.lerp_(tensors.tuned[0], tensors.value(self.config.alpha))
