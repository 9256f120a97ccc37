"""Passes that methods make by themselves: gradients and losses of draws from the memory, and gradients of the task."""

from __future__ import annotations

from safecl.distributed import collectives
from safecl.engine.teachers.outputs import mean_nll, outputs_of_rows
from safecl.methods.terms import ReplayTerm
from safecl.training.steps import step as steps
from safecl.training.steps.read_ahead import Ready
from safecl.training.steps.state import RunState


class OwnPasses:
    """The passes of a run's methods beside the step's own; safecl.methods.context.Run documents them. All are
    collective calls."""

    def __init__(self, run: RunState):
        self._run = run

    def memory_gradient(self, kind: str, draw: ReplayTerm) -> bool:
        run = self._run
        ready = run.ready.pop(draw.stream, None) or Ready(steps.drawn_rows(run, draw, run.step), None)
        return self._stash(kind, ready)

    def task_gradient(self, kind: str) -> bool:
        run = self._run
        instead = steps.memory_step(run.active_methods, run.step, run.num_steps)
        term = steps.TASK if instead is None else instead.stream
        own = [row.weighted(term, row.ce_weight) for row in run.ready[steps.TASK].rows if row.term == term]
        return self._stash(kind, Ready(own, None))

    def memory_loss(self, draw: ReplayTerm) -> float:
        run = self._run
        ready = run.ready.get(draw.stream) or Ready(steps.drawn_rows(run, draw, run.step), None)
        run.online_teachers.ask(ready.rows)
        return run.engine.loss_pass(ready.rows, ready.batches).totals()[draw.stream]

    def gradient_loss(self, draw: ReplayTerm) -> float:
        losses = next(losses for _, losses in reversed(self._run.passes) if draw.stream in losses.terms)
        return losses.totals()[draw.stream]

    def task_row_losses(self) -> list[float]:
        run = self._run
        assert run.task is not None, "a task has begun"
        found = outputs_of_rows(run.engine, run.task.dataset, "topk", k=1, temperature=1.0)
        own = [(index, mean_nll(output)) for index, output in found]
        return [loss for _, loss in sorted(collectives.gather_objects(own))]

    def hidden_gradient_norms(self, draw: ReplayTerm) -> list[float]:
        run = self._run
        ready = run.ready.pop(draw.stream, None) or Ready(steps.drawn_rows(run, draw, run.step), None)
        return run.engine.hidden_gradient_norms(ready.rows, ready.batches)

    def layer_similarities(self, draw: ReplayTerm) -> list[float]:
        return self._run.engine.layer_similarities(steps.drawn_rows(self._run, draw, self._run.step))

    def _stash(self, kind: str, ready: Ready) -> bool:
        run = self._run
        run.online_teachers.ask(ready.rows)
        losses = run.engine.gradient_pass(ready.rows, run.engine.stash(kind), batches=ready.batches)
        run.passes.append((ready.rows, losses))
        return run.engine.optimizer.result.applied
