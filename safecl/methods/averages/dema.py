"""Adaptive average of the instruction assistant (DEMA, Qiao et al. 2025, "Large Continual Instruction Assistant", arXiv
2410.10868, ICML 2025): every tensor has a decay of its own, which follows its gradient.

    bar_l <- (1 - a_l) bar_l + a_l theta_l,     a_l = 2 (1 + ||g_l||_1) / (||theta_l - bar_l||_1 ||g_l - g'_l||_1)

g_l is the gradient of tensor l in this step, before clipping, and g'_l that of the last step: their difference stands
for the curvature. Where a_l is not between 0 and 1 it is `otherwise`, as in the authors' code. The norms are sums over
whole tensors, so a_l depends on their sizes: in small tensors it is often above 1. The log says in how many it was not.

bar begins as the weights after a task's first step. Training does not see it; it is evaluated and saved, and the next
task begins with it. With LoRA the average is of the factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from safecl.config import MethodConfig
from safecl.methods import base

if TYPE_CHECKING:
    import torch

AVERAGE, LAST_GRADIENT = "ema", "dema_grad"


class Config(MethodConfig):
    """DEMA: an average of the weights with a decay for each tensor and step."""

    keeps_average: ClassVar[bool] = True
    state_kinds: ClassVar[tuple[str, ...]] = (AVERAGE, LAST_GRADIENT)

    otherwise: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of the new weights where the adaptive one is not between 0 and 1."""


class Method(base.Method[Config]):
    def start_task(self, run: base.Run) -> None:
        run.set_anchor(AVERAGE, moving=True)
        self._begun = False
        self._adaptive = self._all = 0

    def after_update(self, run: base.Run, shards: Sequence[base.Shard]) -> None:
        if self._begun:
            shares = self._shares(run, shards)
            for part in run.parts(shards):
                average = part.shard.state[AVERAGE].view(-1)[part.where]
                new = part.shard.param.view(-1)[part.where].to(average.device)
                average.lerp_(new, shares[part.number])
        for shard in shards:
            if not self._begun:
                shard.state[AVERAGE].copy_(shard.param)
            shard.keep(LAST_GRADIENT, shard.grad)
        self._begun = True

    def end_task(self, run: base.Run) -> None:
        if self._all:
            run.log(f"dema: {self._adaptive / self._all:.0%} of the tensors' steps had an adaptive decay")

    def _shares(self, run: base.Run, shards: Sequence[base.Shard]) -> list[float]:
        """a_l of all tensors, by number."""
        sums = [(quantity, base.one_of) for quantity in (_moved, _gradient, _change)]
        moved, gradient, change = run.dots_per_tensor(shards, sums)
        shares = 2 * (1 + gradient) / (moved * change).clamp_min(1e-30)
        adaptive = (shares > 0) & (shares < 1)
        self._adaptive, self._all = self._adaptive + int(adaptive.sum()), self._all + len(shares)
        found: list[float] = shares.where(adaptive, self.config.otherwise).tolist()
        return found


def _gradient(shard: base.Shard) -> torch.Tensor:
    return shard.grad.abs()


def _change(shard: base.Shard) -> torch.Tensor:
    return (shard.grad - shard.state[LAST_GRADIENT]).abs()


def _moved(shard: base.Shard) -> torch.Tensor:
    return (shard.param - shard.state[AVERAGE].to(shard.param.device)).abs()
