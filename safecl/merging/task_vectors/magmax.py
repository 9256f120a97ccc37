"""MagMax: of all task vectors, each weight keeps the entry of the largest magnitude.

    theta = theta_base + lambda tau_max,    tau_max[j] = tau_i[j] with i = argmax_i |tau_i[j]|

The tuned models are those of a sequence of tasks, each tuned from the one before. Of equal magnitudes that of the first
model counts. Source: Marczak et al., MagMax, arXiv 2407.06322.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from safecl.merging import base
from safecl.merging.places import Coefficient

if TYPE_CHECKING:
    import torch


class Config(base.MergeConfig):
    """The largest entry of all task vectors."""

    needs: ClassVar[base.Needs] = base.Needs(base="yes", fewest=2)

    scale: Coefficient = 1.0
    """lambda: factor of the merged task vector. The paper chooses it on held-out rows, near 0.5."""


class Merge(base.Merge[Config]):
    by_rows = True

    def combine(self, tensors: base.Tensors) -> torch.Tensor:
        from safecl.merging.arithmetic import where_greater_

        largest, *others = tensors.task_vectors()
        for vector in others:
            where_greater_(largest, vector)
        return tensors.needed_base.add_(largest, alpha=tensors.value(self.config.scale))
