"""One run in flight: the engine, the memory and the methods, and a training step made of them. This is what methods see as `run`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from safecl.config import RunConfig
from safecl.engine.batch import Distillation, StepRow
from safecl.engine.fisher import estimate_fisher
from safecl.engine.memory import Memory
from safecl.engine.optimizer import Shard, UpdatePlan
from safecl.engine.plan import TaskPlan
from safecl.engine.schedule import learning_rate
from safecl.engine.training import StepLosses, TrainingEngine
from safecl.methods.base import Method, ReplayTerm

TASK = "task"


class Run:
    """The state of a run that methods may read and change (safecl.methods.base.Run describes what they may use)."""

    def __init__(self, config: RunConfig, engine: TrainingEngine, methods: list[Method], log: Callable[[str], None]):
        self.config, self.engine, self.methods = config, engine, methods
        self.seed = config.train.seed
        self.log = log
        self.memory: Memory | None = None
        self.step = self.num_steps = 0
        self.global_step = self.skipped_steps = 0
        self.last_learning_rate = 0.0
        self._active: list[Method] = []

    # ---------------------------------------------------------------------------------------------------- for the methods

    def shards(self) -> list[Shard]:
        return self.engine.optimizer.shards()

    def reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        return self.engine.shards.reduce_sum(values)

    def publish(self) -> None:
        self.engine.shards.publish()

    def set_anchor(self, kind: str = "anchor") -> None:
        """theta_0 in a bf16 run is bf16 numbers, so a bf16 anchor is exact before the first update; later anchors are fp32."""
        untouched = self.global_step == 0 and self.config.model.dtype == "bf16" and kind == "anchor"
        self.engine.optimizer.copy_weights_to(kind, torch.bfloat16 if untouched else torch.float32)

    def estimate_fisher(self, *, sign_batches: int, rows_per_batch: int, kind: str = "fisher") -> float:
        rows = self.memory.all_rows()
        return estimate_fisher(
            self.engine, rows, self.memory.row_ids(), seed=self.seed, sign_batches=sign_batches, rows_per_batch=rows_per_batch, kind=kind
        )

    def gradient_pass(self, rows: list[StepRow], then: Callable[[list[Shard]], None]) -> StepLosses:
        """One gradient over `rows` and what is done with it; see safecl.engine.training."""
        return self.engine.gradient_pass(rows, then)

    # ------------------------------------------------------------------------------------------------------------- a task

    def begin_task(self, task: TaskPlan, active: bool) -> None:
        """Fresh moments, anchors and averages. `active` is False for the alignment task, which no method constrains."""
        self.step, self.num_steps = 0, task.num_steps
        self._active = self.methods if active else []
        self.engine.optimizer.reset_moments()
        for method in self._active:
            method.start_task(self)
        if any(method.ema_decay(self) is not None for method in self._active):
            self.engine.optimizer.copy_weights_to("ema")

    def end_task(self) -> None:
        for method in self._active:
            method.end_task(self)

    @property
    def saves_average(self) -> bool:
        """True where the model to evaluate and to save is the EMA."""
        return any(method.saves_average for method in self._active) and self.engine.optimizer.has("ema")

    # ------------------------------------------------------------------------------------------------------------- a step

    def train_step(self, task: TaskPlan) -> StepLosses:
        """One optimizer step of the task: task rows and replay rows in one forward pass, one backward, one pass over the shard."""
        rows = self.step_rows(task)
        terms = list(dict.fromkeys(row.term for row in rows))
        losses = self.engine.gradient_pass(rows, self.engine.update(self._update_plan()), terms, self._temperature())
        self.step += 1
        self.global_step += 1
        return losses

    def step_rows(self, task: TaskPlan) -> list[StepRow]:
        """All rows of the current global step with their weights, the same list on every rank."""
        rows = _task_rows(task, self.step)
        for stream, terms in _by_stream(self._active).items():
            rows += self._replay_rows(stream, terms, task.tokens_per_batch)
        return rows

    def _replay_rows(self, stream: str, terms: list[ReplayTerm], task_tokens: int) -> list[StepRow]:
        wanted = max(1, round(self.config.memory.replay_ratio * task_tokens))
        drawn = self.memory.draw(self.global_step, wanted, stream)
        total = max(1, sum(row.num_targets for row in drawn))
        ce_weight = sum(term.ce_weight for term in terms) / total
        distillations = tuple(Distillation(term.divergence, term.kd_weight / total) for term in terms if term.kd_weight > 0)
        return [row.weighted(stream, ce_weight, distillations) for row in drawn]

    def _update_plan(self) -> UpdatePlan:
        train = self.config.train
        self.last_learning_rate = learning_rate(train, self.step, self.num_steps)
        decays = [decay for method in self._active if (decay := method.ema_decay(self)) is not None]
        return UpdatePlan(
            lr=self.last_learning_rate,
            clip_norm=train.clip_norm,
            clip_scope=train.clip_scope,
            penalties=[penalty for method in self._active if (penalty := method.penalty()) is not None],
            ema_decay=decays[0] if decays else None,
            transforms=self._hooks("transform_gradient"),
            after_update=self._hooks("after_update"),
        )

    def _hooks(self, name: str) -> list[Callable[[list[Shard]], None]]:
        """The hooks that the active methods really define, as functions of the shards."""
        methods = [m for m in self._active if getattr(type(m), name) is not getattr(Method, name)]
        return [functools.partial(getattr(m, name), self) for m in methods]

    def _temperature(self) -> float:
        return self.config.memory.teacher.temperature if self.config.memory is not None else 1.0


def _task_rows(task: TaskPlan, step: int) -> list[StepRow]:
    data, indices = task.dataset, task.order.rows_of_step(step)
    total = max(1, int(data.num_targets[indices].sum()))
    sizes = zip(indices.tolist(), data.lengths[indices].tolist(), data.num_targets[indices].tolist(), strict=True)
    return [StepRow(TASK, length, targets, lambda i=i: (data.row(i), None), 1.0 / total) for i, length, targets in sizes]


def _by_stream(methods: list[Method]) -> dict[str, list[ReplayTerm]]:
    """Replay terms of one stream share their rows."""
    streams: dict[str, list[ReplayTerm]] = {}
    for method in methods:
        for term in method.replay_terms():
            if term.ce_weight or term.kd_weight or term.stream not in streams:
                streams.setdefault(term.stream, []).append(term)
    return streams
