"""Booster (Huang et al. 2025, arXiv 2409.01586, ICLR 2025): an alignment stage after which a step on harmful rows
lowers their loss less.

    g = grad A(theta) + lamb (grad H(theta) - grad H(theta - alpha grad H(theta) / ||grad H(theta)||))

A is the loss of the alignment rows and H that of harmful rows, drawn anew in every step. The second term is the
gradient of H(theta) - H(theta - alpha grad H / ||grad H||), by how much a harmful step would lower the harmful loss,
with the step's own dependence on theta left out, as in the paper. It acts on the first task, with `role: align`, and
needs harmful rows. Each step costs two more forward and backward passes over them, and 8 bytes per trained weight. The
norm is over all trained weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from safecl.methods import base
from safecl.methods.harmful import HarmfulConfig

HERE, THERE = "_booster_grad", "_booster_moved_grad"


class Config(HarmfulConfig):
    """Booster: an alignment stage that weakens harmful steps."""

    acts_on: ClassVar[Literal["align"]] = "align"
    gradient_passes: ClassVar[float] = 2
    state_kinds: ClassVar[tuple[str, ...]] = (HERE, THERE)

    lamb: Annotated[float, Field(ge=0)] = 5.0
    """Factor of the term that weakens harmful steps."""
    alpha: Annotated[float, Field(gt=0)] = 0.1
    """Length of the harmful step."""
    share: Annotated[float, Field(gt=0)] = 1.0
    """Tokens of harmful rows in each step, as a share of the task's tokens."""


class Method(base.Method[Config]):
    def __init__(self, name: str, config: Config):
        super().__init__(name, config)
        self._is_known = False

    @property
    def _draw(self) -> base.ReplayTerm:
        return base.ReplayTerm("booster", ce_weight=1.0, share=self.config.share, harmful=self.config.harmful)

    def gradient_draws(self, step: int) -> list[base.ReplayTerm]:
        return [self._draw]

    def before_step(self, run: base.Run) -> None:
        self._is_known = run.memory_gradient(HERE, self._draw)
        if self._is_known:
            run.perturb(HERE, -self.config.alpha)
            self._is_known = run.memory_gradient(THERE, self._draw)
            run.restore()
        if not self._is_known:
            run.log(
                f"booster: step {run.step}: the gradient of the harmful rows is not finite, the step is a plain one"
            )

    def transform_gradient(self, run: base.Run, shards: Sequence[base.Shard]) -> None:
        if not self._is_known:
            return
        for shard in shards:
            shard.grad.add_(shard.state[HERE].to(shard.grad.device), alpha=self.config.lamb)
            shard.grad.sub_(shard.state[THERE].to(shard.grad.device), alpha=self.config.lamb)
