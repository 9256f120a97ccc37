"""Averaged gradient episodic memory (A-GEM, Chaudhry et al. 2019, arXiv 1812.00420, equation 11): a step must not go
against the memory.

    g~ = g                        where g . r >= 0
    g~ = g - (g . r / r . r) r    otherwise

g is the step's gradient, r the gradient of the mean cross-entropy of a draw from the memory at the same weights; then
g~ . r >= 0 up to rounding. The dot products are global: three numbers in one all-reduce. It costs one more forward and
backward per step, and one fp32 value per weight.

The gradient is orthogonal to r, not the step: AdamW divides the gradient by its own root mean square and adds momentum,
so the step may still have a part along r. Only the draw of this step is protected. The log gives the share of projected
steps at the end of a task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from safecl.config import MethodConfig
from safecl.methods import base

if TYPE_CHECKING:
    import torch

MEMORY_GRADIENT, STREAM = "_memory_grad", "agem"


class Config(MethodConfig):
    """A-GEM: gradients that conflict with the memory's are projected."""

    needs_memory: ClassVar[bool] = True
    gradient_passes: ClassVar[int] = 1
    state_kinds: ClassVar[tuple[str, ...]] = (MEMORY_GRADIENT,)

    margin: Annotated[float, Field(ge=-1, le=1)] = 0.0
    """Project, to orthogonality, where the cosine of both gradients is below this. 0 is the paper's value; 1 projects
    at every step."""


class Method(base.Method[Config]):
    def start_task(self, run: base.Run) -> None:
        self._known = False
        self._num_projected = 0

    def gradient_streams(self) -> list[str]:
        return [STREAM]

    def before_step(self, run: base.Run) -> None:
        self._known = run.memory_gradient(MEMORY_GRADIENT, stream=STREAM)
        if not self._known:
            run.log(f"agem: step {run.step}: the memory's gradient is not finite, this step is not projected")

    def transform_gradient(self, run: base.Run, shards: Sequence[base.Shard]) -> None:
        if not self._known:
            return
        gg, gr, rr = run.dots(shards, [(_grad, _grad), (_grad, _memory), (_memory, _memory)])
        if rr > 0 and gr < self.config.margin * (gg * rr).sqrt():
            self._num_projected += 1
            for shard in shards:
                shard.grad.sub_(_memory(shard) * float(gr / rr))

    def end_task(self, run: base.Run) -> None:
        run.log(f"agem: {self._num_projected} of {run.num_steps} steps were projected")


def _grad(shard: base.Shard) -> torch.Tensor:
    return shard.grad


def _memory(shard: base.Shard) -> torch.Tensor:
    return shard.state[MEMORY_GRADIENT]
