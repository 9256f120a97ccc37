"""DARE with TIES: random drops instead of trimming, then the election of signs.

    tau_i = m_i tau_i / density,  m_i ~ Bernoulli(density);    elect and merge as `ties`

Sources: Yu et al., arXiv 2311.03099; Yadav et al., arXiv 2306.01708. As in mergekit's `dare_ties`, the sum of the
entries that agree is not divided by their weights (`normalize=true` does). Ours: rescaling divides by the density; see
`dare`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safecl.merging import base
from safecl.merging.task_vectors._settings import check, weights_of
from safecl.merging.task_vectors.dare import DropConfig, dropped

if TYPE_CHECKING:
    import torch


class Config(DropConfig):
    """Task vectors with random entries dropped, where signs agree."""

    normalize: bool = False
    """Divide by the sum of the weights of the entries that agree."""


class Merge(base.Merge[Config]):
    reads_ahead = True

    def prepare(self) -> None:
        check("dare_ties", self.config, self.models)

    def combine(self, tensors: base.Tensors) -> torch.Tensor:
        from safecl.kernels import elected_sum_

        elected_sum_(
            tensors.needed_base,
            dropped(self.config, tensors),
            weights_of(self.config, tensors),
            scale=tensors.value(self.config.scale),
            normalize=self.config.normalize,
        )
        return tensors.needed_base
