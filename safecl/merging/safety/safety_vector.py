"""Safety vector: adds the difference between an aligned model and an unaligned one to a tuned model.

    theta = theta_tuned + scale (theta_aligned - theta_unaligned)

The base is the unaligned model: the one before alignment, or the aligned one after tuning on harmful answers, as in the
source: Bhardwaj et al., Language models are Homer Simpson! (RESTA), arXiv 2402.11746. Ours: its variant with dropped
and rescaled changes (DARE) is two merges, `dare` before this one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from safecl.merging import base
from safecl.merging.places import Coefficient
from safecl.merging.safety._direction import check_direction

if TYPE_CHECKING:
    import torch


class Config(base.MergeConfig):
    """Sum of a tuned model and the safety vector."""

    needs: ClassVar[base.Needs] = base.Needs(base="yes", aligned="yes", most=1)

    scale: Coefficient = 0.5
    """Factor of the safety vector, aligned minus base. 0 is the tuned model."""


class Merge(base.Merge[Config]):
    by_rows = True

    def prepare(self) -> None:
        check_direction(self.models)

    def combine(self, tensors: base.Tensors) -> torch.Tensor:
        vector = tensors.needed_aligned.sub_(tensors.needed_base)
        return tensors.tuned[0].add_(vector, alpha=tensors.value(self.config.scale))
