"""Corrective replay: a burst of steps on the memory alone, when a task has ended or when the memory's loss has risen.

    L = alpha * KL(p0, p) + beta * CE       on rows drawn from the memory
        + mix * CE(task rows)               in the same steps

A few steps on refusals restore most of what a task has undone: "one-shot safety patch" (arXiv 2601.01887) does so with
one row, k-FPF (Zhao et al. 2023, arXiv 2304.04158) with bursts on the buffer in the place of replay in every step, and
SafeAnchor (Guo et al. 2026, arXiv 2604.17691) when a monitor of safety falls below its threshold. The monitor here is
the mean cross-entropy of a draw from the memory, compared with that of the same kind of draw before the task: one
forward pass every `every` steps.

Refusals alone, trained after the task, also teach the model to refuse too much. `mix` keeps the task in the burst: set
it where the rows are your own or screened. AdamW starts afresh before a burst and after it. Where the run saves an
average of the weights, the burst at a task's end corrects that average.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from safecl.config import MethodConfig
from safecl.methods import base

MONITOR = base.ReplayTerm("corrective_replay", ce_weight=1.0)


class Config(MethodConfig):
    """A burst of steps on the memory alone, at a task's end or when the memory's loss rises."""

    needs_memory: ClassVar[bool] = True

    steps: Annotated[int, Field(ge=1)] = 20
    """Optimizer steps of a burst, each of as many tokens of the memory as the task has in a step."""
    at_end: bool = True
    """Make a burst when a task ends."""
    every: Annotated[int, Field(ge=1)] | None = None
    """Look at the memory's loss every so many steps, and make a burst where it has risen too far; null: only at the
    end."""
    limit: Annotated[float, Field(gt=1)] = 1.5
    """Largest loss of the memory that is left alone, relative to that before the task's first step."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Constant learning rate of a burst; null: train.learning_rate."""
    alpha: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the distance to the aligned model's outputs."""
    beta: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the cross-entropy."""
    mix: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the cross-entropy of the task's rows in the same steps; 0 trains the memory alone."""

    @property
    def needs_teacher(self) -> bool:
        return self.alpha > 0

    @property
    def forward_passes(self) -> float:
        return 1 / self.every if self.every is not None else 0


class Method(base.Method[Config]):
    def start_task(self, run: base.Run) -> None:
        self._allowed: float | None = None
        self._num_bursts = 0

    def gradient_draws(self, step: int) -> list[base.ReplayTerm]:
        every = self.config.every
        return [MONITOR] if every is not None and (step == 0 or (step + 1) % every == 0) else []

    def before_step(self, run: base.Run) -> None:
        if self.config.every is not None and self._allowed is None:
            self._allowed = self.config.limit * run.memory_loss(MONITOR)

    def after_step(self, run: base.Run) -> None:
        every = self.config.every
        if every is None or (run.step + 1) % every != 0 or run.step + 1 == run.num_steps:
            return
        loss = run.memory_loss(MONITOR)
        if self._allowed is not None and loss > self._allowed:
            self._burst(run, f"the memory's loss is {loss:.3f}, above {self._allowed:.3f}", str(run.step))

    def end_task(self, run: base.Run) -> None:
        if self.config.at_end:
            self._burst(run, "the task has ended", "end", of_average=True)

    def _burst(self, run: base.Run, why: str, name: str, of_average: bool = False) -> None:
        config = self.config
        draw = base.ReplayTerm(f"corrective_replay {name}", ce_weight=config.beta, kd_weight=config.alpha)
        self._num_bursts += 1
        loss = run.correct(
            config.steps, draw, learning_rate=config.learning_rate, task_share=config.mix, of_average=of_average
        )
        run.log(f"corrective_replay: step {run.step}: {why}; after {config.steps} steps its loss is {loss:.3f}")
