"""SafeGrad (Yi et al. 2025, arXiv 2508.07172, ICASSP 2026): gradient surgery between the user's task and alignment.

    g_u~ = g_u - (g_u . g_a / g_a . g_a) g_a     where g_u . g_a < 0, else g_u
    g    = g_u~ + rho g_a

g_u is the gradient of the user's loss, g_a that of KL(p0, p) on a draw from the memory, where p0 are the aligned
model's outputs: their whole distribution holds more about safe behaviour than the labels, so few rows do. The dot
products are global. It costs one more forward and backward per step, and one fp32 value per weight. The paper's text
was not at hand, and its abstract gives no value of rho.

Two gradients agree after the projection, and AdamW's step need not agree with either (see agem).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from safecl.config import MethodConfig
from safecl.config.base import Change
from safecl.methods import base

if TYPE_CHECKING:
    import torch

ALIGNMENT_GRADIENT, DRAW = "_alignment_grad", base.ReplayTerm("safe_grad", kd_weight=1.0)


class Config(MethodConfig):
    """SafeGrad: the part of the user's gradient that goes against alignment is removed, and alignment's is added."""

    needs_memory: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = True
    gradient_passes: ClassVar[float] = 1
    changes: ClassVar[Change] = Change("gradient", "whole")
    state_kinds: ClassVar[tuple[str, ...]] = (ALIGNMENT_GRADIENT,)

    rho: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the alignment gradient in the sum; 0 projects only."""


class Method(base.Method[Config]):
    def start_task(self, run: base.Run) -> None:
        self._known = False
        self._num_projected = 0

    def gradient_draws(self, step: int) -> list[base.ReplayTerm]:
        return [DRAW]

    def before_step(self, run: base.Run) -> None:
        self._known = run.memory_gradient(ALIGNMENT_GRADIENT, DRAW)
        if not self._known:
            run.log(f"safe_grad: step {run.step}: the alignment gradient is not finite, the user's is left as it is")

    def transform_gradient(self, run: base.Run, shards: Sequence[base.Shard]) -> None:
        if not self._known:
            return
        ua, aa = run.dots(shards, [(_user, _alignment), (_alignment, _alignment)])
        conflict = float(ua / aa) if aa > 0 and ua < 0 else 0.0
        self._num_projected += conflict < 0
        for shard in shards:
            shard.grad.add_(_alignment(shard), alpha=self.config.rho - conflict)

    def end_task(self, run: base.Run) -> None:
        run.log(f"safe_grad: {self._num_projected} of {run.num_steps} gradients conflicted with alignment's")


def _user(shard: base.Shard) -> torch.Tensor:
    return shard.grad


def _alignment(shard: base.Shard) -> torch.Tensor:
    return shard.state[ALIGNMENT_GRADIENT]
