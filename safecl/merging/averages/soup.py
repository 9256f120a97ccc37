"""Uniform soup: the plain average of models that were tuned from one base.

    theta = (1 / n) sum_i theta_i

Source: Wortsman et al., Model soups, arXiv 2203.05482. This is its uniform soup; safecl.merging.greedy makes the greedy
one, which adds a model where that does not lower what is measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from safecl.merging import base

if TYPE_CHECKING:
    import torch


class Config(base.MergeConfig):
    """Plain average of the tuned models."""

    needs: ClassVar[base.Needs] = base.Needs(base="no", fewest=2)


class Merge(base.Merge[Config]):
    by_rows = True

    def combine(self, tensors: base.Tensors) -> torch.Tensor:
        from safecl.merging.arithmetic import weighted_sum_

        count = len(tensors.tuned)
        return weighted_sum_(tensors.tuned, [1.0 / count] * count)
