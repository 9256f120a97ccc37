"""The corrective phase: a few optimizer steps on the memory alone, which restore what training has lost.

    loss of a step = loss of a draw from the memory + task_share * CE(task rows)

A method asks for it at a task's end or between steps (methods.corrective_replay), and so may the run's gate. AdamW
starts afresh before the phase, whose gradients are others than the task's, and after it. Penalties of methods act on
these steps; their other hooks do not. The phase is part of the step, or of the task's end, that asks for it: a run that
is killed within it resumes before it, and repeats it bitwise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from safecl.engine.passes.step_rows import StepRow
from safecl.engine.zero.shard import Shard
from safecl.engine.zero.update import UpdatePlan
from safecl.methods.base import BEFORE
from safecl.methods.terms import ReplayTerm
from safecl.planning.plans import TaskPlan
from safecl.training.steps import step as steps
from safecl.training.steps.penalties import Penalties
from safecl.training.steps.state import RunState


@dataclass(frozen=True)
class CorrectivePhase:
    """Settings of one phase.

    draw: rows of the memory and the weights of their losses; as many tokens as the task has in a step unless it says
    otherwise. learning_rate: constant. task_share: weight of the cross-entropy of task rows in the same steps.
    of_average: correct the average of the weights, where the run saves it; the live weights are then the same. modules:
    patterns of the names of weights that move, empty for all; the old weights are then kept during a step.
    """

    run_state: RunState
    penalties: Penalties
    draw: ReplayTerm
    learning_rate: float
    task_share: float = 0.0
    of_average: bool = False
    modules: tuple[str, ...] = ()

    def run(self, num_steps: int) -> float:
        """Make the steps; return the loss of the draw in the last one, NaN for no steps. A collective call."""
        engine, average = self.run_state.engine, self.of_average and self.run_state.engine.optimizer.has("ema")
        engine.optimizer.reset_moments()
        if average:
            engine.shards.swap(engine.optimizer.tensors("ema"))
        loss = float("nan")
        for number in range(num_steps):
            loss = self._step(number)
        if average:
            engine.optimizer.copy_weights_to("ema")
        if self.modules:
            engine.optimizer.drop(BEFORE)
        engine.optimizer.reset_moments()
        return loss

    def _step(self, number: int) -> float:
        run, rows = self.run_state, self._rows(number)
        run.online_teachers.ask(rows)
        methods, train = run.active_methods, run.config.train
        plan = UpdatePlan(
            lr=self.learning_rate,
            clip_norm=train.clip_norm,
            clip_scope=train.clip_scope,
            penalties=self.penalties.in_update(methods),
            step_transforms=[self._keep_others] if self.modules else (),
        )
        losses = run.engine.gradient_pass(rows, run.engine.update(plan), self.penalties.in_loss(methods))
        if not run.engine.optimizer.result.applied:
            run.log(f"corrective step {number}: skipped, its gradient is not finite")
        return losses.totals()[self._stream(number)]

    def _keep_others(self, shards: list[Shard]) -> None:
        """Put back the weights that are not among `modules`."""
        for part in self.run_state.engine.parts(shards):
            if not any(fnmatchcase(part.name, pattern) for pattern in self.modules):
                part.shard.param.view(-1)[part.where].copy_(part.shard.state[BEFORE].view(-1)[part.where])

    def _rows(self, number: int) -> list[StepRow]:
        """Return the rows of a step: another draw in each, and the task's rows from the last step back."""
        run, task = self.run_state, self.run_state.task
        assert task is not None, "a task has begun"
        draw = replace(
            self.draw, stream=self._stream(number), share=1.0 if self.draw.share is None else self.draw.share
        )
        return steps.drawn_rows(run, draw, run.step) + (self._task_rows(task, number) if self.task_share else [])

    def _task_rows(self, task: TaskPlan, number: int) -> list[StepRow]:
        rows = steps.task_rows(self.run_state, task, (task.num_steps - 1 - number) % task.num_steps)
        return [row.weighted(row.term, row.ce_weight * self.task_share) for row in rows]

    def _stream(self, number: int) -> str:
        return f"{self.draw.stream} {number}"
