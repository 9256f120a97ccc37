"""Dark experience replay (Buzzega et al. 2020, arXiv 2004.07211): replay the model's outputs, not only the targets.

    L = CE(task rows) + alpha * D(stored outputs of the aligned model, current outputs) on rows drawn from the memory

The stored outputs are those of the aligned model when the row entered the memory: the k likeliest tokens'
log-probabilities and the log of the remaining mass. D is KL(stored || current) over these k + 1 events, or the mean
squared difference of the k stored entries, both sides centred over the k (the paper's distance; softmax ignores a
constant that MSE would not, and its scale is another).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from safecl.config import MethodConfig
from safecl.methods import base


class Config(MethodConfig):
    """Dark experience replay."""

    needs_memory: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = True

    alpha: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the distance to the stored outputs."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Factor of the cross-entropy on the same replayed rows (DER++ draws them independently)."""
    distance: Literal["forward_kl", "reverse_kl", "jsd", "mse"] = "forward_kl"
    """Distance to the stored outputs."""


class Method(base.Method[Config]):
    def replay_terms(self) -> list[base.ReplayTerm]:
        return [
            base.ReplayTerm(
                "replay", ce_weight=self.config.beta, kd_weight=self.config.alpha, divergence=self.config.distance
            )
        ]
