"""One run in flight: the life of its tasks, and one training step.

A step, from the top down: `train_step` takes the rows and micro-batches that were read while the step before computed
(read_ahead.py; step.py makes the rows), lets methods take their own gradients, asks online teachers, and makes one
forward and backward pass and one update (`update_plan` says what the update does).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from safecl.config import RunConfig
from safecl.engine.artifacts.teacher_outputs import needs_outputs
from safecl.engine.passes.attention import guard_attention
from safecl.engine.passes.step_losses import StepLosses
from safecl.engine.passes.step_rows import StepRow
from safecl.engine.passes.training_engine import TrainingEngine
from safecl.engine.zero.shard import Shard
from safecl.engine.zero.update import UpdatePlan
from safecl.methods.base import Method
from safecl.planning.memory_kinds import tags_of_task_rows
from safecl.planning.plans import TaskPlan, apply_screening
from safecl.training import step as steps
from safecl.training.learning_rate import learning_rate
from safecl.training.method_view import MethodView
from safecl.training.penalties import Penalties
from safecl.training.read_ahead import ReadAhead, Ready
from safecl.training.replay_memory import insert_rows, sample_rows
from safecl.training.state import RunState


class Run(RunState):
    """A run that trains. All methods are collective calls, unless they say otherwise."""

    def __init__(
        self,
        config: RunConfig,
        engine: TrainingEngine,
        methods: Sequence[Method[Any]],
        log: Callable[[str], None],
        tasks: Sequence[TaskPlan] = (),
    ):
        super().__init__(config, engine, methods, log, tasks)
        self.view = MethodView(self, self._memory_gradient)
        self.penalties = Penalties(
            engine, has_adapters=self.has_adapters, fisher_on_host=config.deepspeed.offload.fisher == "cpu"
        )
        self._ahead: ReadAhead | None = None
        self._ready: dict[str, Ready] = {}
        """The rows and micro-batches read for the current step, by gradient; each is removed when it is used."""
        self.passes: list[tuple[list[StepRow], StepLosses]] = []
        """The passes of the last step, for draws that follow losses and for messages."""
        self._waited = 0.0

    # ---------------------------------------------------------------------------------------------------------- a task

    def screen(self, decisions: dict[str, dict[str, Any]]) -> None:
        """Leave out the rows that a scan has flagged, or lower their weight. A resumed run does it again."""
        self.stop_reading()
        self.screening = decisions
        for task in self.tasks:
            if task.config.name in decisions:
                apply_screening(self.config, task, decisions[task.config.name])

    def begin_task(self, task: TaskPlan, active: bool) -> None:
        """Reset moments and averages, let the teachers and the methods prepare; other state of earlier tasks stays.

        active: False for the alignment task, which no method constrains.
        """
        self.stop_reading()
        self.step, self.num_steps, self.task = 0, task.num_steps, task
        self.first_step = self.global_step
        self.active_methods = self.methods if active else []
        self.engine.optimizer.reset_moments()
        if active:
            self._keep_rows_of_previous_task()
            terms = steps.task_terms(self.active_methods)
            self.recorded_teachers.record(terms, task, self.tasks or [task], self.log)
            self.online_teachers.begin_task(task.config.name)
            self.online_teachers.open(task.tokens_per_batch)
        if self.engine.store is not None and self.engine.store.where == "file":
            self.engine.store.check_unchanged()  # another process may have written into a mapped file
        for method in self.active_methods:
            method.start_task(self.view)
        if any(method.ema_decay(self.view) is not None for method in self.active_methods):
            self.engine.optimizer.copy_weights_to("ema")
        self.release_reference()

    def _keep_rows_of_previous_task(self) -> None:
        """Insert rows of the finished task into the memory, with the outputs of the model that it produced."""
        settings = self.config.memory
        if self.previous is None or settings is None or not settings.keep_task_rows:
            return
        assert self.memory is not None, "the memory is filled before the first task"
        name = self.previous.config.name
        rows = sample_rows(self.previous.dataset, settings.keep_task_rows, self.seed)
        insert_rows(
            self.engine,
            self.memory,
            rows,
            settings,
            with_teacher=needs_outputs(self.config),
            source=self.previous.config.train,
            task=name,
            step=self.global_step,
            tags=tags_of_task_rows(settings, rows),
        )
        self.log(f"memory: {len(rows)} rows of {name} entered")

    def release_reference(self) -> None:
        """Free the reference weights once nothing reads them: the anchor has moved, the teacher is another model.

        Only the run's state decides, so a resumed run holds what an uninterrupted one holds. Not a collective call.
        """
        methods_have_begun = bool(self.active_methods) or self.global_step > 0
        if methods_have_begun and not self.engine.optimizer.reads_store and not self.online_teachers.read_run_store:
            self.engine.release_store()

    def end_task(self) -> None:
        self.stop_reading()
        for method in self.active_methods:
            method.end_task(self.view)
        if self.active_methods:
            self.previous = self.task

    def finish(self) -> None:
        """Remove the files that only an unfinished run needs. Until now an older checkpoint could still need them."""
        self.recorded_teachers.discard()
        self.online_teachers.close(discard=True)

    def close(self) -> None:
        """Stop reading ahead, and free the teachers' memory, however the run ends. Not a collective call."""
        self.stop_reading()
        self.online_teachers.close()

    # ---------------------------------------------------------------------------------------------------------- a step

    def train_step(self, task: TaskPlan) -> StepLosses:
        """Make one optimizer step of the task: task rows and replayed rows in one forward pass, one backward pass, one
        pass over the shard."""
        every = self.config.model.attention_check
        if every is not None and self.global_step > 0 and self.global_step % every == 0:
            guard_attention(self.engine, self.log)
        self._ready, self.passes = self._take_ready(task), []
        for method in self.active_methods:
            method.before_step(self.view)
        ready = self._ready.pop(steps.TASK)
        self.online_teachers.ask(ready.rows)
        losses = self.engine.gradient_pass(
            ready.rows,
            self.engine.update(self.update_plan()),
            self.penalties.in_loss(self.active_methods),
            ready.batches,
        )
        self.passes.append((ready.rows, losses))
        if self.engine.optimizer.result.applied:
            self._log_losses_of_replayed_rows()
        self.step += 1
        self.global_step += 1
        return losses

    def update_plan(self) -> UpdatePlan:
        """Return the plan of the optimizer's update in the current step."""
        train = self.config.train
        self.last_learning_rate = learning_rate(train, self.step, self.num_steps)
        decays = [decay for method in self.active_methods if (decay := method.ema_decay(self.view)) is not None]
        masks = [mask for method in self.active_methods if (mask := method.ema_mask()) is not None]
        return UpdatePlan(
            lr=self.last_learning_rate,
            clip_norm=train.clip_norm,
            clip_scope=train.clip_scope,
            penalties=self.penalties.in_update(self.active_methods),
            ema_decay=decays[0] if decays else None,
            ema_mask=masks[0] if masks else None,
            transforms=self._hooks("transform_gradient"),
            after_update=self._hooks("after_update"),
        )

    def _hooks(self, name: str) -> list[Callable[[list[Shard]], None]]:
        """Return the hooks of this name that the active methods define, as functions of the shards."""
        methods = [m for m in self.active_methods if getattr(type(m), name) is not getattr(Method, name)]
        return [functools.partial(getattr(m, name), self.view) for m in methods]

    def _memory_gradient(self, kind: str, stream: str) -> bool:
        """See safecl.methods.context.Run.memory_gradient."""
        ready = self._ready.pop(stream, None) or Ready(steps.gradient_rows(self, stream, self.step), None)
        losses = self.engine.gradient_pass(ready.rows, self.engine.stash(kind), batches=ready.batches)
        self.passes.append((ready.rows, losses))
        return self.engine.optimizer.result.applied

    def _log_losses_of_replayed_rows(self) -> None:
        if self.memory is None or not self.memory.follows_losses or not self.active_methods:
            return
        rows = [row for rows, _ in self.passes for row in rows]
        own = {key: loss for _, losses in self.passes for key, loss in losses.of_replayed_rows().items()}
        self.memory.log_losses(self.global_step, rows, own)

    # ------------------------------------------------------------------------------------------------------------- rows

    def step_rows(self, task: TaskPlan, step: int | None = None) -> list[StepRow]:
        """Return all rows of a step of the current task (by default the next one), the same list on every rank. Not a
        collective call."""
        return steps.step_rows(self, task, self.step if step is None else step)

    def _take_ready(self, task: TaskPlan) -> dict[str, Ready]:
        if self._ahead is None:
            self._ahead = ReadAhead(
                self.engine, functools.partial(steps.rows_by_gradient, self, task), stop=task.num_steps
            )
        return self._ahead.get(self.step)

    def settle(self) -> None:
        """Wait until nothing is being read, before the memory's state is taken. Not a collective call."""
        if self._ahead is not None:
            self._ahead.settle()

    def stop_reading(self) -> None:
        """Stop reading ahead; the next step starts it again. Not a collective call."""
        if self._ahead is not None:
            self._waited += self._ahead.wait_seconds
            self._ahead.close()
            self._ahead = None

    @property
    def wait_seconds(self) -> float:
        """Seconds that steps have waited for their rows in total, the first steps of tasks included."""
        return self._waited + (self._ahead.wait_seconds if self._ahead is not None else 0.0)
