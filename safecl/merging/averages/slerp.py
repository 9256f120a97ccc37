"""SLERP: a point on the arc between two models, each tensor a vector.

    theta = sin((1 - t) O) / sin(O) theta_0  +  sin(t O) / sin(O) theta_1,
    cos(O) = <theta_0, theta_1> / (|theta_0| |theta_1|)

Source: Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985. As in mergekit, the coefficients multiply
the unnormalised tensors, and a tensor with |cos(O)| > 0.9995 is averaged linearly; tuned models are mostly that near to
their base, so the report counts such tensors. Ours: so is one whose norm is 0, which has no direction.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from safecl.config import ConfigError
from safecl.merging import base
from safecl.merging.places import Coefficient

if TYPE_CHECKING:
    import torch


class Config(base.MergeConfig):
    """A point on the arc between two models."""

    needs: ClassVar[base.Needs] = base.Needs(base="optional", most=2)

    t: Coefficient = 0.5
    """Share of the second model. The first is the base, or without one the first tuned model."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.9995
    """Cosine above which a tensor is averaged linearly."""


class Merge(base.Merge[Config]):
    reads_ahead = True
    num_linear = 0
    num_tensors = 0

    def prepare(self) -> None:
        if len(self.models.tuned) + (self.models.base is not None) != 2:
            raise ConfigError("slerp takes two models: --base and one --tuned, or two --tuned")

    def combine(self, tensors: base.Tensors) -> torch.Tensor:
        first, second = ([tensors.base] if tensors.base is not None else []) + tensors.tuned
        left, right = self._coefficients(first, second, tensors.value(self.config.t))
        return first.mul_(left).add_(second, alpha=right)

    def _coefficients(self, first: torch.Tensor, second: torch.Tensor, t: float) -> tuple[float, float]:
        from safecl.merging.arithmetic import dots

        own, other, both = dots(first, second)
        length = math.sqrt(own * other)
        cosine = both / length if length > 0 else 1.0
        self.num_tensors += 1
        if abs(cosine) > self.config.threshold:
            self.num_linear += 1
            return 1 - t, t
        angle = math.acos(cosine)
        return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)

    def notes(self) -> list[str]:
        return [
            f"{self.num_linear} of {self.num_tensors} tensors averaged linearly: cosine above {self.config.threshold:g}"
        ]
