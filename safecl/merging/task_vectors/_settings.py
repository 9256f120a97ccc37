"""Settings that merges of task vectors share. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from safecl.merging import base
from safecl.merging.places import Coefficient

if TYPE_CHECKING:
    import torch


class WeightsConfig(base.MergeConfig):
    """Weights of task vectors."""

    needs: ClassVar[base.Needs] = base.Needs(base="yes")

    weights: Annotated[list[Coefficient], Field(min_length=1)] | None = None
    """w_i: weight of each tuned model's task vector; 1 by default. A negative one takes its task away."""


class TaskVectorConfig(WeightsConfig):
    """Settings of a sum of task vectors."""

    scale: Coefficient = 1.0
    """lambda: factor of the merged task vector. 0 is the base."""


class TrimConfig(TaskVectorConfig):
    """Settings of merges that leave out entries of the task vectors."""

    density: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of a task vector's entries that is kept."""


def check(kind: str, config: WeightsConfig, models: base.Models) -> None:
    """Raise ConfigError where there are not as many weights as tuned models."""
    from safecl.merging.arithmetic import check_weights

    check_weights(kind, config.weights, len(models.tuned), "the tuned ones")


def weights_of(config: WeightsConfig, tensors: base.Tensors) -> list[float]:
    """Return the weight of each task vector for a tensor."""
    from safecl.merging.arithmetic import weights_at

    return weights_at(config.weights, tensors, len(tensors.tuned))


def add_sum(
    config: TaskVectorConfig, tensors: base.Tensors, vectors: list[torch.Tensor], normalize: bool
) -> torch.Tensor:
    """Return base + lambda sum_i w_i tau_i, in the memory of the base; `normalize` divides by sum_i w_i."""
    weights = weights_of(config, tensors)
    total = sum(weights) if normalize else 1.0
    factor = tensors.value(config.scale) / (total if abs(total) > 1e-8 else 1.0)
    for vector, weight in zip(vectors, weights, strict=True):
        tensors.needed_base.add_(vector, alpha=factor * weight)
    return tensors.needed_base
