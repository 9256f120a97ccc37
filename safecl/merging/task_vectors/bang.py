"""Balanced averaging: scales task vectors to one length before they are averaged, so that none drowns the others.

    theta = theta_base + lambda sum_i w_i (m / |tau_i|) tau_i / sum_i w_i,    m = the mean of all |tau_i|

|tau_i| is the norm of the whole task vector (`scope=model`), or of one tensor's (`scope=tensor`). Idea: Lin et al.,
Spurious feature diversification improves out-of-distribution generalization, arXiv 2309.17230, whose BANG (balanced
averaging) shows that an over-confident model dominates an average, and calibrates models while they are tuned. Ours: a
merge comes after tuning, and balances by the length of the task vectors, which grows with the same overtraining.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from safecl.config import ConfigError
from safecl.merging import base
from safecl.merging.task_vectors._settings import TaskVectorConfig, add_sum, check

if TYPE_CHECKING:
    import torch


class Config(TaskVectorConfig):
    """Average of task vectors of one length."""

    needs: ClassVar[base.Needs] = base.Needs(base="yes", fewest=2)

    scope: Literal["model", "tensor"] = "model"
    """Give whole task vectors one length, or those of each tensor."""


class Merge(base.Merge[Config]):
    reads_ahead = True

    @property
    def num_passes(self) -> int:
        return 1 if self.config.scope == "model" else 0

    def prepare(self) -> None:
        check("bang", self.config, self.models)
        self.squares = [0.0] * len(self.models.tuned)

    def observe(self, tensors: base.Tensors, number: int) -> None:
        for index, vector in enumerate(tensors.task_vectors()):
            self.squares[index] += _square(vector)

    def end_pass(self, number: int) -> None:
        for model, square in zip(self.models.tuned, self.squares, strict=True):
            if square == 0:
                raise ConfigError(f"{model.label}: is the base itself, so there is no task vector to balance")

    def combine(self, tensors: base.Tensors) -> torch.Tensor:
        vectors = tensors.task_vectors()
        squares = self.squares if self.config.scope == "model" else [_square(vector) for vector in vectors]
        lengths = [math.sqrt(square) for square in squares]
        mean = sum(lengths) / len(lengths)
        for vector, length in zip(vectors, lengths, strict=True):
            vector.mul_(mean / length if length > 0 else 1.0)
        return add_sum(self.config, tensors, vectors, normalize=True)

    def notes(self) -> list[str]:
        if self.config.scope == "tensor":
            return []
        lengths = ", ".join(
            f"{model.label} {math.sqrt(square):.4g}"
            for model, square in zip(self.models.tuned, self.squares, strict=True)
        )
        return [f"lengths of the task vectors before they were balanced: {lengths}"]


def _square(vector: torch.Tensor) -> float:
    from safecl.merging.arithmetic import dot

    return dot(vector, vector)
