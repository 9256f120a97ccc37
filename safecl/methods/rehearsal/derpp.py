"""Dark experience replay ++ (Buzzega et al. 2020, arXiv 2004.07211, equation 6): replay the model's outputs on one draw
and the targets on another.

    L = CE(task rows) + alpha * D(stored outputs of the aligned model, current outputs) on rows x' drawn from the memory
                      + beta * CE on rows x'' drawn from the memory independently

Stored outputs and distances are those of `der`. The second draw makes the step's replay twice as large as that of
`der`; `der` with a beta puts both terms on one draw, at half the cost.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from safecl.config import MethodConfig
from safecl.methods import base


class Config(MethodConfig):
    """Dark experience replay ++: the cross-entropy on a second, independent draw."""

    needs_memory: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = True

    alpha: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the distance to the stored outputs, on the first draw."""
    beta: Annotated[float, Field(ge=0)] = 0.5
    """Factor of the cross-entropy on the second draw."""
    distance: Literal["forward_kl", "reverse_kl", "jsd", "mse"] = "forward_kl"
    """Distance to the stored outputs."""


class Method(base.Method[Config]):
    def replay_terms(self) -> list[base.ReplayTerm]:
        return [
            base.ReplayTerm("replay", kd_weight=self.config.alpha, divergence=self.config.distance),
            base.ReplayTerm("replay2", ce_weight=self.config.beta),
        ]
