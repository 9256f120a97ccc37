"""Fisher-weighted average: each weight counts as much as its model needs it.

    theta = sum_i w_i F_i theta_i / sum_i w_i F_i          (elementwise)

F_i is the diagonal Fisher information of model i, e.g. a file of `safecl fisher`. Source: Matena and Raffel, Merging
models with Fisher-weighted averaging, arXiv 2111.09832. Ours: each F_i is divided by its mean over all weights, so that
models with larger gradients do not count more (`normalize`), and `floor` is added, which makes the plain average of
weights that no model needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from safecl.config import ConfigError
from safecl.merging import base
from safecl.merging.places import Coefficient

if TYPE_CHECKING:
    import torch

    from safecl.merging.models.tensor_files import TensorFiles


class Config(base.MergeConfig):
    """Average in which each weight counts by its Fisher information."""

    needs: ClassVar[base.Needs] = base.Needs(base="optional")

    fisher: Annotated[list[str], Field(min_length=1)]
    """A safetensors file for each model, the base first where there is one: one value per weight, by the weights'
    names, as `safecl fisher` writes them."""
    weights: Annotated[list[Coefficient], Field(min_length=1)] | None = None
    """Weight of each model, the base first where there is one; equal by default."""
    normalize: bool = True
    """Divide each model's Fisher information by its mean over all weights."""
    floor: Annotated[float, Field(gt=0)] = 1e-6
    """Added to the Fisher information, after it was normalised."""


class Merge(base.Merge[Config]):
    by_rows = True

    def prepare(self) -> None:
        from safecl.merging.models.fisher import open_fisher

        models = [*([self.models.base] if self.models.base is not None else []), *self.models.tuned]
        if len(models) < 2:
            raise ConfigError(
                "fisher_average needs two models or more: --tuned FOLDER, once for each, or --base as well"
            )
        for key, values in (("fisher", self.config.fisher), ("weights", self.config.weights)):
            if values is not None and len(values) != len(models):
                raise ConfigError(f"fisher_average.{key}: {len(values)} values for {len(models)} models")
        self.fishers = [open_fisher(path, self.models.tuned[0], self.models.places) for path in self.config.fisher]
        self.means = [self._mean(fisher) if self.config.normalize else 1.0 for fisher in self.fishers]

    def _mean(self, fisher: TensorFiles) -> float:
        from safecl.merging.models.fisher import read_fisher

        count, total = 0, 0.0
        for name in self.models.places:
            values = read_fisher(fisher, name)
            count, total = count + values.numel(), total + float(values.double().sum())
        if total <= 0:
            raise ConfigError(f"{fisher.label}: all values are 0")
        return total / count

    def combine(self, tensors: base.Tensors) -> torch.Tensor:
        from safecl.merging.arithmetic import weights_at

        values = [*([tensors.base] if tensors.base is not None else []), *tensors.tuned]
        weights = weights_at(self.config.weights, tensors, len(values))
        stop = tensors.start + len(values[0]) if values[0].dim() else None
        divisor = values[0].new_zeros(values[0].shape)
        for value, weight, fisher, mean in zip(values, weights, self.fishers, self.means, strict=True):
            importance = fisher.read(tensors.name, tensors.start, stop).div_(mean).add_(self.config.floor).mul_(weight)
            divisor.add_(importance)
            value.mul_(importance)
        for value in values[1:]:
            values[0].add_(value)
        return values[0].div_(divisor)
