"""LiNeS: scales task vectors by depth, so that the first blocks, which hold what is general, change least.

    theta_l = theta_base + (alpha + beta l / (L - 1)) sum_i w_i tau_i        in block l of L
    theta   = theta_base + alpha sum_i w_i tau_i                             outside of the blocks

Source: Wang, Dimitriadis et al., LiNeS, arXiv 2410.17146. For one tuned model beta = 1 - alpha, so the last block keeps
the whole task vector. For n models alpha = 1 / n, which is the paper's |sum_i tau_i| / (n |merged tau|) for a merged
vector that is the sum, and beta is to be searched; 1 - alpha here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from safecl.merging import base
from safecl.merging.task_vectors._settings import WeightsConfig, check, weights_of

if TYPE_CHECKING:
    import torch


class Config(WeightsConfig):
    """Sum of task vectors, scaled by depth."""

    usual_sweep: ClassVar[str] = "alpha=0:1:0.1"

    alpha: float | None = None
    """Factor of the first block, and of all weights outside of the blocks. By default 1 / n for n tuned models, and 0.5
    for one."""
    beta: float | None = None
    """What is added to it in the last block; 1 - alpha by default."""


class Merge(base.Merge[Config]):
    by_rows = True

    def prepare(self) -> None:
        check("lines", self.config, self.models)

    def combine(self, tensors: base.Tensors) -> torch.Tensor:
        from safecl.merging.arithmetic import weighted_sum_

        total = weighted_sum_(tensors.task_vectors(), weights_of(self.config, tensors))
        return tensors.needed_base.add_(total, alpha=self._factor(tensors))

    def _factor(self, tensors: base.Tensors) -> float:
        count = len(tensors.tuned)
        default = 1.0 / count if count > 1 else 0.5
        alpha = self.config.alpha if self.config.alpha is not None else default
        beta = self.config.beta if self.config.beta is not None else 1.0 - alpha
        return alpha if tensors.place.block is None else alpha + beta * tensors.place.depth
