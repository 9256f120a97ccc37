"""Linear average of models.

    theta = sum_i w_i theta_i / sum_i w_i

The convention is mergekit's `linear` (https://github.com/arcee-ai/mergekit), `normalize` included. Where a base is
given it is one of the models, the first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from safecl.config import ConfigError
from safecl.merging import base
from safecl.merging.places import Coefficient

if TYPE_CHECKING:
    import torch


class Config(base.MergeConfig):
    """Weighted average of all models."""

    needs: ClassVar[base.Needs] = base.Needs(base="optional")

    weights: Annotated[list[Coefficient], Field(min_length=1)] | None = None
    """Weight of each model, the base first where there is one; equal by default."""
    normalize: bool = True
    """Divide by the sum of the weights."""


class Merge(base.Merge[Config]):
    by_rows = True

    def prepare(self) -> None:
        from safecl.merging.arithmetic import check_weights

        count = len(self.models.tuned) + (self.models.base is not None)
        if count < 2:
            raise ConfigError("linear needs two models or more: --tuned FOLDER, once for each, or --base as well")
        check_weights("linear", self.config.weights, count, "the base first, where there is one")

    def combine(self, tensors: base.Tensors) -> torch.Tensor:
        from safecl.merging.arithmetic import weighted_sum_, weights_at

        values = [*([tensors.base] if tensors.base is not None else []), *tensors.tuned]
        weights = weights_at(self.config.weights, tensors, len(values))
        if self.config.normalize:
            total = sum(weights)
            if abs(total) < 1e-8:
                raise ConfigError(f"linear.weights: their sum is {total:g} for {tensors.name}; use normalize=false")
            weights = [weight / total for weight in weights]
        return weighted_sum_(values, weights)
