"""SPAG, the alternating safety projection of SPARD (Chen et al. 2026, arXiv 2605.28030): a step that leaves the safe
set is followed by one back towards it.

    theta+ = the step on the user's rows
    theta  = theta+ - min((L(theta+) - tau) / ||g||^2, eta) g      where L(theta+) > tau;      g = grad L(theta+)

L is the mean cross-entropy of a draw from the memory. Without the cap eta the second step is the projection onto the
half-space in which the linearised loss is at most tau. The constraint has no factor to tune: while it holds nothing is
changed, and the step costs one forward pass over the draw. Where it does not, it costs one more forward and backward.
The norm is that of the whole gradient, as in the equation; the authors' code divides by the norm (not squared) of each
tensor's own gradient.

tau is near the aligned model's own loss: `tau: null` takes it from the draw of the first step. An average of the
weights follows the first of both steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from safecl.config import MethodConfig
from safecl.methods import base

if TYPE_CHECKING:
    import torch

SAFETY_GRADIENT, DRAW = "_safety_grad", base.ReplayTerm("spag", ce_weight=1.0)


class Config(MethodConfig):
    """SPAG: where the memory's loss exceeds a limit after a step, a capped step lowers it."""

    needs_memory: ClassVar[bool] = True
    gradient_passes: ClassVar[float] = 1
    forward_passes: ClassVar[float] = 1
    state_kinds: ClassVar[tuple[str, ...]] = (SAFETY_GRADIENT,)

    tau: Annotated[float, Field(ge=0)] | None = 0.2
    """Largest loss of the memory (nats per token) that is left alone; null: the loss of the first draw under the model
    that the task begins with."""
    eta: Annotated[float, Field(gt=0)] | None = None
    """Cap of the factor of the safety gradient; null: the learning rate of the step, as in the paper."""


class Method(base.Method[Config]):
    def start_task(self, run: base.Run) -> None:
        self._num_corrected = 0
        self._tau = self.config.tau

    def gradient_draws(self, step: int) -> list[base.ReplayTerm]:
        return [DRAW]

    def before_step(self, run: base.Run) -> None:
        if self._tau is None:
            self._tau = run.memory_loss(DRAW)
            run.log(f"spag: tau is {self._tau:.3f}, the memory's loss before the first step")

    def after_step(self, run: base.Run) -> None:
        assert self._tau is not None, "before_step has set it"
        excess = run.memory_loss(DRAW) - self._tau
        if not excess > 0:
            return
        if not run.memory_gradient(SAFETY_GRADIENT, DRAW):
            run.log(f"spag: step {run.step}: the safety gradient is not finite, nothing is corrected")
            return
        self._num_corrected += 1
        shards = run.shards()
        (square,) = run.dots(shards, [(_safety, _safety)])
        cap = run.learning_rate if self.config.eta is None else self.config.eta
        factor = min(excess / max(float(square), 1e-30), cap)
        for shard in shards:
            shard.param.sub_(_safety(shard).to(shard.param.device), alpha=factor)
        run.publish()

    def end_task(self, run: base.Run) -> None:
        run.log(f"spag: {self._num_corrected} of {run.num_steps} steps were followed by a safety step")


def _safety(shard: base.Shard) -> torch.Tensor:
    return shard.state[SAFETY_GRADIENT]
