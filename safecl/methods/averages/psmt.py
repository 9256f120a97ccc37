"""Masked average of the weights, the teacher of PSMT (Tian & Lyu 2024, arXiv 2407.02253), for safety.

    bar_t,i = eta_i * bar_{t-1},i + (1 - eta_i) * theta_t,i
    eta_i   = decay_protected where F_i is among the largest, else decay

F is the diagonal Fisher of the memory's rows under the aligned model: it is large for the weights on which the kept
behaviour depends. Their average stays at the start (decay_protected: 1, the paper's mask) or follows more slowly; the
average of all other weights follows the training, which does not see it. The saved model is the average. The
optimizer's pass, which reads Fisher and average anyway, chooses each element's decay. The threshold is the exact
quantile of F over all weights, found once by two small all-reduces of counts.

The paper adapts image classifiers at test time and builds its mask anew from unlabelled data at each step; here F is
estimated once.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from safecl.methods import base
from safecl.methods.averages import ema

FISHER = "fisher"  # shared with `ewc`, which uses the same rows and model


class Config(ema.AverageConfig):
    """Masked average (PSMT): the average of important weights stays at the start."""

    needs_memory: ClassVar[bool] = True
    keeps_average: ClassVar[bool] = True
    mask_fisher: ClassVar[str] = FISHER
    state_kinds: ClassVar[tuple[str, ...]] = ("ema", FISHER)
    refuses_lora: ClassVar[str] = (
        "the Fisher of fresh adapters is degenerate, because B = 0 makes the gradient of A vanish; use `ema`, or tune "
        "all weights"
    )

    protected: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the weights, those with the largest Fisher, whose average has its own decay."""
    decay_protected: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Decay of their average; 1 leaves it at the start."""
    sign_batches: Annotated[int, Field(ge=1)] = 64
    """Random-sign batches of the Fisher estimate; its relative error is about 0.9 / sqrt(sign_batches)."""
    rows_per_batch: Annotated[int, Field(ge=1)] = 16
    """Memory rows in one sign batch."""


class Method(base.Method[Config]):
    def __init__(self, name: str, config: Config):
        super().__init__(name, config)
        self.threshold: float | None = None

    def ema_decay(self, run: base.Run) -> float | None:
        return self.config.decay_for(run.num_steps)

    def ema_mask(self) -> base.AverageMask | None:
        if self.threshold is None:
            return None
        return base.AverageMask(FISHER, self.threshold, self.config.decay_protected)

    def before_step(self, run: base.Run) -> None:
        """Find the threshold before the first step: by then `ewc`, where it is used, has set the Fisher."""
        config = self.config
        if self.threshold is not None:
            return
        if not run.has_state(FISHER):
            run.estimate_fisher(sign_batches=config.sign_batches, rows_per_batch=config.rows_per_batch, kind=FISHER)
        self.threshold = run.upper_threshold(FISHER, config.protected)
        share = f"{config.protected:.1%}"
        run.log(f"psmt: the average of {share} of the weights is protected, Fisher above {self.threshold:.3g}")
