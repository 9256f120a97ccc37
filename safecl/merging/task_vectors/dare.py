"""DARE: drops random entries of the task vectors and rescales the others.

    tau_i = m_i tau_i / density,  m_i ~ Bernoulli(density);    theta = theta_base + lambda sum_i w_i tau_i

Source: Yu et al., Language models are super Mario, arXiv 2311.03099. The paper divides by the density, which keeps the
expectation. mergekit's `dare_linear` restores the measured L1 norm of the tensor instead: `rescale=measured`. The draws
depend on `seed`, the number of the tuned model, and the tensor's name only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from safecl.merging import base
from safecl.merging.task_vectors._settings import TrimConfig, add_sum, check

if TYPE_CHECKING:
    import torch


class DropConfig(TrimConfig):
    """Settings of merges that drop random entries."""

    rescale: Literal["expected", "measured", "none"] = "expected"
    """expected: divide by the density; measured: restore each tensor's L1 norm, as mergekit does; none: neither."""
    seed: int = 0
    """Seed of the draws."""


class Config(DropConfig):
    """Sum of task vectors with random entries dropped."""

    normalize: bool = False
    """Divide by the sum of the weights."""


class Merge(base.Merge[Config]):
    reads_ahead = True

    def prepare(self) -> None:
        check("dare", self.config, self.models)

    def combine(self, tensors: base.Tensors) -> torch.Tensor:
        return add_sum(self.config, tensors, dropped(self.config, tensors), self.config.normalize)


def dropped(config: DropConfig, tensors: base.Tensors) -> list[torch.Tensor]:
    """Return the task vectors with random entries dropped and the others rescaled."""
    from safecl.merging.arithmetic import drop_, l1

    vectors = tensors.task_vectors()
    for index, vector in enumerate(vectors):
        before = l1(vector) if config.rescale == "measured" else 0.0
        drop_(vector, config.density, seed=config.seed, model=index, name=tensors.name)
        if config.rescale == "expected":
            vector.div_(config.density)
        elif config.rescale == "measured" and (after := l1(vector)) > 0:
            vector.mul_(before / after)
    return vectors
