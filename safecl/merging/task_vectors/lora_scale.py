"""LoRA-scale discount: applies an adapter at less than its strength.

    W = W_base + factor s B A

The same as `wise_ft` with alpha = factor, for adapters: base and scaling come with the adapter. `adapter_rank`, set to
the adapter's own rank, writes an adapter again. Source: Hu et al., LoRA, arXiv 2106.09685, whose scaling s is
discounted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from safecl.config import ConfigError
from safecl.merging import base
from safecl.merging.places import Coefficient

if TYPE_CHECKING:
    import torch


class Config(base.MergeConfig):
    """An adapter at less than its strength."""

    needs: ClassVar[base.Needs] = base.Needs(base="yes", most=1)

    factor: Coefficient = 0.5
    """Share of the adapter's scaling that is kept: 0 is the base, 1 the adapter as it was trained."""


class Merge(base.Merge[Config]):
    by_rows = True

    def prepare(self) -> None:
        from safecl.storage.model_folder import is_adapter

        if not is_adapter(self.models.folders["tuned"]):
            raise ConfigError(
                f"{self.models.tuned[0].label}: is no LoRA adapter; for whole models the same is wise_ft alpha=FACTOR"
            )

    def combine(self, tensors: base.Tensors) -> torch.Tensor:
        return tensors.needed_base.lerp_(tensors.tuned[0], tensors.value(self.config.factor))
