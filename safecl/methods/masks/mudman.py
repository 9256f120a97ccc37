"""Disruption masking of MUDMAN (Sondej et al. 2025, arXiv 2506.12484), with the memory as what is retained: a weight
moves only where the user's gradient and the memory's have the same sign.

    a <- momentum * a + (1 - momentum) * r             r = gradient of the CE of a draw from the memory
    g_i <- g_i where sign(g_i) = sign(a_i), else 0

In the paper g unlearns a skill and r retains the others, the updates are normalised, and meta-learning goes around it;
the mask is the part that keeps a step from disrupting something else. Every element of a masked step lowers the
memory's loss or leaves it, to first order; about half of the elements remain where both gradients are unrelated.
`mask: step` masks the step that AdamW has taken instead of the gradient, so that momentum does not move masked weights.
It costs one more forward and backward per step, and two fp32 values per weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from safecl.config import MethodConfig
from safecl.config.base import Change
from safecl.methods import base

if TYPE_CHECKING:
    import torch

MEMORY_GRADIENT, MEAN, DRAW = "_mudman_grad", "mudman_memory", base.ReplayTerm("mudman", ce_weight=1.0)


class Config(MethodConfig):
    """Sign agreement: weights move only where the memory's gradient agrees."""

    needs_memory: ClassVar[bool] = True
    gradient_passes: ClassVar[float] = 1

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the running mean of the memory's gradients; 0 takes the gradient of this step alone."""
    mask: Literal["gradient", "step"] = "gradient"
    """What is masked: the gradient before AdamW, as in the paper, or the step that AdamW has taken. `step` keeps the
    old weights during a step, 4 more bytes per weight."""

    @property
    def changes(self) -> Change:
        return Change(self.mask, "tensors")

    @property
    def state_kinds(self) -> tuple[str, ...]:
        return (MEMORY_GRADIENT, MEAN, *((base.BEFORE,) if self.mask == "step" else ()))


class Method(base.Method[Config]):
    def gradient_draws(self, step: int) -> list[base.ReplayTerm]:
        return [DRAW]

    def before_step(self, run: base.Run) -> None:
        if not run.memory_gradient(MEMORY_GRADIENT, DRAW):
            run.log(f"mudman: step {run.step}: the memory's gradient is not finite and is left out of the mean")
            return
        for shard in run.shards():
            new = shard.state[MEMORY_GRADIENT]
            if MEAN in shard.state:
                shard.state[MEAN].lerp_(new, 1 - self.config.momentum)
            else:
                shard.state[MEAN] = new * (1 - self.config.momentum)

    def transform_gradient(self, run: base.Run, shards: Sequence[base.Shard]) -> None:
        for shard in shards if self.config.mask == "gradient" else ():
            if MEAN in shard.state:
                shard.grad.mul_(_agrees(shard, shard.grad))

    def transform_step(self, run: base.Run, shards: Sequence[base.Shard]) -> None:
        import torch

        for shard in shards:
            if MEAN in shard.state:
                before = shard.state[base.BEFORE]
                shard.param.copy_(torch.where(_agrees(shard, before - shard.param), shard.param, before))


def _agrees(shard: base.Shard, direction: torch.Tensor) -> torch.Tensor:
    """Elements whose direction, downhill for the user, is downhill for the memory too."""
    return direction.sign() == shard.state[MEAN].sign()
