"""One run in flight: the life of its tasks, and one training step.

A step, from the top down: `train_step` takes the rows and micro-batches that were read while the step before computed
(read_ahead.py; step.py makes the rows), lets methods take their own gradients, asks online teachers, and makes one
forward and backward pass and one update (`update_plan` says what the update does).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from safecl.config import ConfigError, RunConfig
from safecl.distributed import collectives
from safecl.engine.artifacts.teacher_outputs import needs_outputs
from safecl.engine.passes.attention import guard_attention
from safecl.engine.passes.label_means import fill_label_means
from safecl.engine.passes.step_losses import StepLosses
from safecl.engine.passes.step_rows import StepRow
from safecl.engine.passes.training_engine import TrainingEngine
from safecl.engine.zero.shard import Shard
from safecl.engine.zero.update import UpdatePlan
from safecl.methods.base import BEFORE, Method
from safecl.methods.terms import ReplayTerm
from safecl.planning.memory_kinds import tags_of_task_rows
from safecl.planning.plans import TaskPlan, apply_screening
from safecl.training.end_merge import merge_as_set
from safecl.training.replay_memory import insert_rows, sample_rows
from safecl.training.steps import step as steps
from safecl.training.steps.corrective import CorrectivePhase
from safecl.training.steps.hook_order import in_order
from safecl.training.steps.learning_rate import learning_rate
from safecl.training.steps.method_view import MethodView
from safecl.training.steps.own_passes import OwnPasses
from safecl.training.steps.penalties import Penalties
from safecl.training.steps.read_ahead import ReadAhead, Ready
from safecl.training.steps.state import RunState


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
        self.own_passes = OwnPasses(self)
        self.view = MethodView(self, self.own_passes, self.correct)
        self.penalties = Penalties(
            engine,
            config.model,
            has_adapters=self.has_adapters,
            fisher_on_host=config.deepspeed.offload.fisher == "cpu",
        )
        self._ahead: ReadAhead | None = None
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

        active: False for the alignment task, which only methods for that stage act on.
        """
        self.stop_reading()
        self.step, self.num_steps, self.task = 0, task.num_steps, task
        self.first_step = self.global_step
        self.active_methods = self.methods_of("task" if active else "align")
        self.engine.optimizer.reset_moments()
        if active:
            self._keep_rows_of_previous_task()
            terms = steps.task_terms(self.active_methods)
            tasks = self.tasks or [task]
            self.recorded_teachers.record(terms, task, tasks, self.log)
            self._record_prompts()
            self._record_scores(task, tasks)
            self.online_teachers.begin_task(task.config.name)
            self.online_teachers.open(task.tokens_per_batch)
        if self.engine.store is not None and self.engine.store.where == "file":
            self.engine.store.check_unchanged()  # another process may have written into a mapped file
        self._call("start_task")
        if any(method.ema_decay(self.view) is not None for method in self.active_methods):
            self.engine.optimizer.copy_weights_to("ema")
        self.release_reference()

    def _record_scores(self, task: TaskPlan, tasks: Sequence[TaskPlan]) -> None:
        """Compute the scores that are missing, and show the methods those of the task."""
        self.row_scores.record((s for method in self.active_methods for s in method.scores()), tasks, self.log)
        everything = np.arange(len(task.dataset))
        for method in self.active_methods:
            if scores := steps.scores_of(self, method, task, everything):
                method.see_scores(scores)

    def _record_prompts(self) -> None:
        tokenizer = self.plan.tokenizer if self.plan is not None else None
        for term in steps.prompt_terms(self.active_methods):
            assert self.memory is not None, "the config refuses such a method without a memory"
            self.prompt_anchors.record(term, self.memory, tokenizer, self.seed, self.log)

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
        self._call("end_task")
        merge_as_set(self)
        if self.task is not None and self.task.config.role != "align" and self.active_methods:
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
        self.ready, self.passes = self._take_ready(task), []
        self._call("before_step")
        losses = self._update(self.ready.pop(steps.TASK))
        result = self.engine.optimizer.result
        if result.applied:
            self._log_losses_of_replayed_rows()
            self._show_losses_of_task_rows(losses)
            self._call("after_step")
            self.engine.optimizer.result = result
        self.step += 1
        self.global_step += 1
        return losses

    def _update(self, ready: Ready) -> StepLosses:
        """Make the step's own pass and its update."""
        self.online_teachers.ask(ready.rows)
        fill_label_means(self.engine, ready.rows)
        update = self.engine.update(self.update_plan())
        then = self.engine.restore(update) if self.engine.is_perturbed else update
        pull = self.penalties.in_loss(self.active_methods)
        moves = [move for method in self.active_methods if (move := method.hidden_move()) is not None]
        if moves:
            losses = self.engine.moved_hidden_pass(ready.rows, then, moves[0], pull, ready.batches)
        else:
            losses = self.engine.gradient_pass(ready.rows, then, pull, ready.batches)
        self.passes.append((ready.rows, losses))
        return losses

    def update_plan(self) -> UpdatePlan:
        """Return the plan of the optimizer's update in the current step."""
        train = self.config.train
        is_first = self.global_step == self.step
        of_methods = math.prod(method.learning_rate_factor(self.view) for method in self.active_methods)
        scheduled = learning_rate(train, self.step, self.num_steps, is_first=is_first)
        self.last_learning_rate = self.learning_rate_factor * scheduled * of_methods
        decays = [decay for method in self.active_methods if (decay := method.ema_decay(self.view)) is not None]
        masks = [mask for method in self.active_methods if (mask := method.ema_mask()) is not None]
        return UpdatePlan(
            lr=self.last_learning_rate,
            clip_norm=train.clip_norm,
            clip_scope=train.clip_scope,
            penalties=self.penalties.in_update(self.active_methods),
            ema_decay=decays[0] if decays else None,
            ema_mask=masks[0] if masks else None,
            transforms=self._hooks("transform_gradient", self.active_methods),
            step_transforms=[
                functools.partial(method.transform_step, self.view)
                for method in self.active_methods
                if BEFORE in method.config.state_kinds and type(method).transform_step is not Method.transform_step
            ],
            after_update=self._hooks(
                "after_update", [method for method in self.active_methods if method.acts_after_update(self.view)]
            ),
        )

    @torch.no_grad()
    def _call(self, hook: str) -> None:
        """Call a hook of all active methods. They change weights freely; passes that they ask for have gradients."""
        for method in in_order(self.active_methods, hook):
            getattr(method, hook)(self.view)
            if self.engine.is_perturbed and method.config.moves_weights != "until_update":
                raise ConfigError(
                    f"methods: {method.name} leaves the weights moved after {hook}; its Config must say so, by "
                    '`moves_weights = "until_update"`, or the method must put them back (Run.restore)'
                )

    def _hooks(self, name: str, methods: Sequence[Method[Any]]) -> list[Callable[[list[Shard]], None]]:
        """Return the hooks of this name that the methods define, as functions of the shards."""
        defined = [m for m in methods if getattr(type(m), name) is not getattr(Method, name)]
        return [functools.partial(getattr(m, name), self.view) for m in defined]

    def correct(
        self,
        num_steps: int,
        draw: ReplayTerm,
        *,
        learning_rate: float | None = None,
        task_share: float = 0.0,
        of_average: bool = False,
        modules: Sequence[str] = (),
    ) -> float:
        """Make a corrective phase at once (safecl.training.steps.corrective) and return its last loss.

        learning_rate: by default train.learning_rate. of_average: correct the model that is saved, where that is the
        average. modules: patterns of the weights that move; empty for all.
        """
        self.stop_reading()
        rate = self.config.train.learning_rate if learning_rate is None else learning_rate
        saved = of_average and self.saves_average
        phase = CorrectivePhase(self, self.penalties, draw, rate, task_share, saved, tuple(modules))
        return phase.run(num_steps)

    def _log_losses_of_replayed_rows(self) -> None:
        if self.memory is None or not self.memory.follows_losses or not self.active_methods:
            return
        rows = [row for rows, _ in self.passes for row in rows]
        own = {key: loss for _, losses in self.passes for key, loss in losses.of_replayed_rows().items()}
        self.memory.log_losses(self.global_step, rows, own)

    def _show_losses_of_task_rows(self, losses: StepLosses) -> None:
        """Tell the methods that follow them the losses of the step's task rows."""
        following = [method for method in self.active_methods if method.config.follows_row_losses]
        if following:
            everywhere = dict(collectives.gather_objects(list(losses.of_task_rows().items())))
            for method in following:
                method.see_row_losses(self.step, everywhere)

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
