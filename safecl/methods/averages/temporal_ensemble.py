"""Temporal ensembles (Soutif-Cormerais et al. 2023, arXiv 2306.16817): an average for evaluation whose decay rises.

    bar_t = eta_t bar_{t-1} + (1 - eta_t) theta_t
    eta_t = first_decay + (decay - first_decay) min(1, t / (warmup T))

The short memory at the beginning lets the average leave the start of the task quickly, the longer one afterwards evens
out the steps: most of the loss of old tasks right after a task change (the stability gap) is gone from the average.
Training does not see it; the average is evaluated and saved.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

from pydantic import Field

from safecl.config import MethodConfig
from safecl.methods import base


class Config(MethodConfig):
    """Temporal ensemble: an average of the weights whose decay rises after the start of a task."""

    keeps_average: ClassVar[bool] = True
    state_kinds: ClassVar[tuple[str, ...]] = ("ema",)

    decay: Annotated[float, Field(ge=0, le=1)] = 0.99
    """Decay after the warm-up."""
    first_decay: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Decay at the task's first step."""
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the task's steps in which the decay rises."""

    def decay_at(self, step: int, num_steps: int) -> float:
        """eta of a step, counted from 0."""
        rising = self.warmup * num_steps
        return self.first_decay + (self.decay - self.first_decay) * (min(1.0, step / rising) if rising else 1.0)

    def decay_for(self, num_steps: int) -> float:
        return self.decay

    def weight_on_start(self, num_steps: int) -> float:
        return math.prod(self.decay_at(step, num_steps) for step in range(num_steps))


class Method(base.Method[Config]):
    def ema_decay(self, run: base.Run) -> float | None:
        return self.config.decay_at(run.step, run.num_steps)
