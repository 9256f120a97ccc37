"""The control arm of averages that are written back at every step: a learning rate times (1 - eta).

    theta_t = eta theta_{t-1} + (1 - eta) (theta_{t-1} + Delta_t) = theta_{t-1} + (1 - eta) Delta_t

An average that replaces the weights in every step is no other algorithm than a smaller learning rate, decoupled weight
decay included. "Rethinking Safety in LLM Fine-tuning" (arXiv 2508.12531) finds both averages and smaller learning
rates to keep safety; compare `ema` with this arm at the same eta to tell them apart. Nothing is averaged.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from safecl.config import MethodConfig
from safecl.methods import base


class Config(MethodConfig):
    """The learning rate times 1 - decay, as the control of an average that is written back at every step."""

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """eta."""


class Method(base.Method[Config]):
    def learning_rate_factor(self, run: base.Run) -> float:
        return 1.0 - self.config.decay
