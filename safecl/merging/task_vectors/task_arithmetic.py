"""Task arithmetic: adds what models have learned, or takes it away.

    theta = theta_base + lambda sum_i w_i tau_i,    tau_i = theta_i - theta_base

A negative weight unlearns: the task vector of a model that was tuned on harmful answers, taken away, lowers their
likelihood. Source: Ilharco et al., Editing models with task arithmetic, arXiv 2212.04089. `normalize` divides by
sum_i w_i, as mergekit's option of that name does; off by default, there as here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from safecl.merging import base
from safecl.merging.task_vectors._settings import TaskVectorConfig, add_sum, check

if TYPE_CHECKING:
    import torch


class Config(TaskVectorConfig):
    """Sum of task vectors."""

    usual_sweep: ClassVar[str] = "scale=0:1:0.1"

    normalize: bool = False
    """Divide by the sum of the weights."""


class Merge(base.Merge[Config]):
    by_rows = True

    def prepare(self) -> None:
        check("task_arithmetic", self.config, self.models)

    def combine(self, tensors: base.Tensors) -> torch.Tensor:
        return add_sum(self.config, tensors, tensors.task_vectors(), self.config.normalize)
