"""Averaged gradient episodic memory (A-GEM, Chaudhry et al. 2019, arXiv 1812.00420, equation 11): a step must not go
against the memory.

    g~ = g                        where g . r >= 0
    g~ = g - (g . r / r . r) r    otherwise

g is the step's gradient, r the gradient of the mean cross-entropy of a draw from the memory at the same weights; then
g~ . r >= 0 up to rounding. The dot products are global: three numbers in one all-reduce. It costs one more forward and
backward per step, and one fp32 value per weight.

With `project: gradient`, the paper's form, the gradient is orthogonal to r and the step is not: AdamW divides the
gradient by its own root mean square and adds momentum, so the step may still have a part along r. `project: step`
applies the same equation to the step d that AdamW has taken, with -d in the place of g, so that the step itself does
not raise the memory's loss, to first order. Only the draw of this step is protected. The log gives the share of
projected steps at the end of a task.
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

MEMORY_GRADIENT, DRAW = "_agem_grad", base.ReplayTerm("agem", ce_weight=1.0)


class Config(MethodConfig):
    """A-GEM: gradients, or steps, that conflict with the memory's gradient are projected."""

    needs_memory: ClassVar[bool] = True
    gradient_passes: ClassVar[float] = 1

    margin: Annotated[float, Field(ge=-1, le=1)] = 0.0
    """Project, to orthogonality, where the cosine of both gradients is below this. 0 is the paper's value; 1 projects
    at every step."""
    project: Literal["gradient", "step"] = "gradient"
    """What is projected: the gradient before AdamW, as in the paper, or the step that AdamW has taken. `step` keeps the
    old weights during a step, 4 more bytes per weight."""

    @property
    def changes(self) -> Change:
        return Change(self.project, "whole")

    @property
    def state_kinds(self) -> tuple[str, ...]:
        return (MEMORY_GRADIENT, base.BEFORE) if self.project == "step" else (MEMORY_GRADIENT,)


class Method(base.Method[Config]):
    def start_task(self, run: base.Run) -> None:
        self._known = False
        self._num_projected = 0

    def gradient_draws(self, step: int) -> list[base.ReplayTerm]:
        return [DRAW]

    def before_step(self, run: base.Run) -> None:
        self._known = run.memory_gradient(MEMORY_GRADIENT, DRAW)
        if not self._known:
            run.log(f"agem: step {run.step}: the memory's gradient is not finite, this step is not projected")

    def transform_gradient(self, run: base.Run, shards: Sequence[base.Shard]) -> None:
        if self._known and self.config.project == "gradient":
            factor = self._factor(run, shards, _grad)
            for shard in shards if factor else ():
                shard.grad.sub_(_memory(shard) * factor)

    def transform_step(self, run: base.Run, shards: Sequence[base.Shard]) -> None:
        if self._known:
            factor = self._factor(run, shards, _descent)
            for shard in shards if factor else ():
                shard.param.add_(_memory(shard), alpha=factor)

    def _factor(self, run: base.Run, shards: Sequence[base.Shard], direction: base.Quantity) -> float:
        """g . r / r . r of a direction g that conflicts with the memory's gradient r; 0 where it does not."""
        gg, gr, rr = run.dots(shards, [(direction, direction), (direction, _memory), (_memory, _memory)])
        if not rr > 0 or gr >= self.config.margin * (gg * rr).sqrt():
            return 0.0
        self._num_projected += 1
        return float(gr / rr)

    def end_task(self, run: base.Run) -> None:
        run.log(f"agem: {self._num_projected} of {run.num_steps} steps were projected")


def _grad(shard: base.Shard) -> torch.Tensor:
    return shard.grad


def _descent(shard: base.Shard) -> torch.Tensor:
    """The step with its sign turned, which is comparable with a gradient."""
    return -base.step_of(shard)


def _memory(shard: base.Shard) -> torch.Tensor:
    return shard.state[MEMORY_GRADIENT]
