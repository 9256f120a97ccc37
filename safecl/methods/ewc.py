"""Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796), for safety: the old task is the aligned behaviour.

    L = L_task + 0.5 * strength * sum_i (F_i / mean F) (theta_i - theta_0,i)^2

F is the diagonal Fisher of the memory's rows under the aligned model, F = mean over rows of (d/d theta mean-token NLL)^2, estimated with
random signs: each row's loss is multiplied by +-1, and B times the squared mean gradient of B rows is an unbiased estimate of the mean
squared per-row gradient for any batch, accumulation and world size. Its relative error is about 0.9 / sqrt(sign_batches).
Dividing by the mean makes `strength` comparable between models. The penalty's gradient is analytic, inside the optimizer's pass.
In a sequence of tasks Fisher and anchor stay those of the aligned model; `online_ewc` moves them along.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from safecl.config import MethodConfig
from safecl.methods import base


class Config(MethodConfig):
    """Elastic weight consolidation."""

    needs_memory: ClassVar[bool] = True
    refuses_lora: ClassVar[str] = (
        "the Fisher of fresh adapters is degenerate, because B = 0 makes the gradient of A vanish; penalise the product instead (l2_sp), "
        "or tune all weights (model.lora: null)"
    )

    strength: Annotated[float, Field(ge=0)] = 0.1
    """Factor of the penalty; multiplies F / mean(F)."""
    sign_batches: Annotated[int, Field(ge=1)] = 64
    """Random-sign batches of the Fisher estimate; its relative error is about 0.9 / sqrt(sign_batches)."""
    rows_per_batch: Annotated[int, Field(ge=1)] = 16
    """Memory rows in one sign batch."""
    proximal: bool = False
    """Apply the penalty as a proximal step after AdamW: stable for any strength times learning rate."""


class Method(base.Method[Config]):
    def start_task(self, run: base.Run) -> None:
        if not run.has_state("anchor"):
            run.set_anchor()
        if self.config.strength > 0 and not run.has_state("fisher"):
            mean = run.estimate_fisher(sign_batches=self.config.sign_batches, rows_per_batch=self.config.rows_per_batch)
            run.log(f"ewc: Fisher of {self.config.sign_batches} sign batches, mean {mean:.3g}")

    def penalty(self) -> base.Penalty | None:
        if self.config.strength == 0:
            return None
        return base.Penalty(self.config.strength, fisher="fisher", proximal=self.config.proximal)
