"""Sharpness-aware minimisation (Foret et al. 2021, arXiv 2010.01412), as a method from outside of safecl."""

from __future__ import annotations

from typing import ClassVar, Literal

from safecl.config import MethodConfig
from safecl.methods import base


class Config(MethodConfig):
    """Steps with the gradient at the worst point nearby."""

    task_gradient_passes: ClassVar[float] = 1
    moves_weights: ClassVar[Literal["until_update"]] = "until_update"
    state_kinds: ClassVar[tuple[str, ...]] = ("_ascent",)

    rho: float = 0.3
    """Distance to that point."""


class Method(base.Method[Config]):
    def before_step(self, run: base.Run) -> None:
        if run.task_gradient("_ascent"):
            run.perturb("_ascent", 2 * self.config.rho)
            run.restore()
            run.perturb("_ascent", self.config.rho)
