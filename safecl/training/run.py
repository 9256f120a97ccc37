"""One run in flight: the engine, the memory and the methods, and a training step made of them. This is what methods see
as `run`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from safecl.config import RunConfig
from safecl.data import TokenDataset
from safecl.distributed import collectives
from safecl.engine.artifacts.fisher import estimate_into, has_room, header_of, shared_fisher
from safecl.engine.artifacts.teacher_outputs import needs_outputs
from safecl.engine.fisher.adapter_penalty import read_fisher_pull
from safecl.engine.fisher.estimate import estimate_fisher
from safecl.engine.fisher.file import load_fisher, open_fisher
from safecl.engine.fisher.threshold import upper_threshold
from safecl.engine.model.adapters import AdapterPull, EvenPull, adapters
from safecl.engine.passes.step_losses import StepLosses
from safecl.engine.passes.step_rows import HIDDEN, Asked, Distillation, Question, StepRow
from safecl.engine.passes.training_engine import TrainingEngine
from safecl.engine.teachers.online import OnlineTeachers
from safecl.engine.teachers.recorded import RecordedOutputs, open_recorded, record_outputs, teacher_folder
from safecl.engine.zero.optimizer import UpdatePlan
from safecl.engine.zero.shard import Quantity, Shard
from safecl.methods.base import Method
from safecl.methods.terms import Penalty, ReplayTerm, TaskTerm
from safecl.planning.plans import RunPlan, TaskPlan, apply_screening
from safecl.training.learning_rate import learning_rate
from safecl.training.read_ahead import Ahead, Ready
from safecl.training.replay_memory import Memory, remember, sample_rows

TASK = "task"
TOO_SMALL_TO_COUNT = 1e-30


class Run:
    """The state of a run that methods may read and change (safecl.methods.context.Run describes what they may use)."""

    def __init__(
        self,
        config: RunConfig,
        engine: TrainingEngine,
        methods: list[Method],
        log: Callable[[str], None],
        tasks: Sequence[TaskPlan] = (),
    ):
        self.config, self.engine, self.methods = config, engine, methods
        self.tasks = [task for task in tasks if task.config.role != "align"]
        """Tasks that methods act on, in order; a task that is not among them stands for itself."""
        self.previous: TaskPlan | None = None
        """The task that ended last; its rows are what online EWC consolidates and what may enter the memory."""
        self.plan: RunPlan | None = None
        """What the run was made of; with it the Fisher of the base model is shared between runs."""
        self.screening: dict[str, dict] = {}
        """By task: flagged rows that are left out or weigh less (safecl.planning.plans.apply_screening)."""
        self.seed = config.train.seed
        self.log = log
        self.memory: Memory | None = None
        self.step = self.num_steps = 0
        self.global_step = self.skipped_steps = 0
        self.first_step = 0
        """The current task's first step, counted over all tasks."""
        self.waited = 0.0
        self.last_learning_rate = 0.0
        self._active: list[Method] = []
        self._recorded: dict[tuple[str, str], RecordedOutputs] = {}
        self._ahead: Ahead | None = None
        self._ready: dict[str, Ready] = {}
        self._replayed: list[tuple[list[StepRow], StepLosses]] = []
        self._pulls: dict[Penalty, AdapterPull] = {}
        self._teachers = OnlineTeachers(config, engine, log=lambda message: self.log(message))
        self.has_adapters = next(adapters(engine.module.model), None) is not None

    # -------------------------------------------------------------------------------------------------- for the methods

    def shards(self) -> list[Shard]:
        return self.engine.optimizer.shards()

    def reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        return self.engine.shards.reduce_sum(values)

    def publish(self) -> None:
        self.engine.shards.publish()

    def weight_names(self) -> list[str]:
        adapted = [name for name, *_ in adapters(self.engine.module.model)]
        return adapted or list(self.engine.shards.shapes)

    def has_state(self, kind: str) -> bool:
        return self.engine.optimizer.has(kind)

    def set_anchor(self, kind: str = "anchor", *, moving: bool = False) -> None:
        """theta_0 in a bf16 run is bf16 numbers, so a bf16 anchor is exact before the first update; later anchors are
        fp32."""
        if self.global_step > 0 or moving:
            self.engine.optimizer.copy_weights_to(kind)
        else:
            self.engine.optimizer.take_base(
                kind, torch.bfloat16 if self.config.model.dtype == "bf16" else torch.float32
            )

    def estimate_fisher(
        self,
        *,
        sign_batches: int,
        rows_per_batch: int,
        kind: str = "fisher",
        rows: Literal["memory", "previous_task"] = "memory",
    ) -> float:
        if rows == "memory" and kind == "fisher" and self._shares_fisher():
            return self._shared_fisher(sign_batches=sign_batches, rows_per_batch=rows_per_batch)
        if rows == "memory":
            chosen, row_ids = self.memory.all_rows(), self.memory.row_ids()
        else:
            data = self.previous.dataset
            chosen, row_ids = dataset_rows(data, np.arange(len(data)), 0.0), data.row_ids.tolist()
        return estimate_fisher(
            self.engine,
            chosen,
            row_ids,
            seed=self.seed,
            sign_batches=sign_batches,
            rows_per_batch=rows_per_batch,
            kind=kind,
        )

    def _shares_fisher(self) -> bool:
        """The Fisher is that of the base model and its memory, and there is room to keep it for other runs."""
        if self.plan is None or self.global_step > 0 or self.config.tasks[0].role == "align":
            return False
        if not (room := has_room(self.config, self.engine.shards.numel)):
            self.log("fisher: too little room in the store of artifacts to keep it for other runs")
        return room

    def _shared_fisher(self, **settings: int) -> float:
        header = header_of(self.config, self.plan.tokenizer, self.plan.memory, **settings)
        rows = self.memory.all_rows(), self.memory.row_ids()

        def build(path: Path) -> None:
            estimate_into(path, header, self.engine, rows, "fisher", self.log)

        return self.load_fisher(str(shared_fisher(self.config, header, build, self.log)))

    def load_fisher(self, path: str, kind: str = "fisher") -> float:
        load_fisher(open_fisher(path), self.engine.shards, self.engine.optimizer, kind)
        return self.engine.optimizer.fisher_means[kind]

    def upper_threshold(self, kind: str, share: float) -> float:
        return upper_threshold(self.engine, kind, share)

    def memory_gradient(self, kind: str, stream: str) -> bool:
        ready = self._ready.pop(stream, None) or Ready(self._gradient_rows(stream, self.step), None)
        losses = self.engine.gradient_pass(ready.rows, self.engine.stash(kind), batches=ready.batches)
        self._replayed.append((ready.rows, losses))
        return self.engine.optimizer.result.applied

    def dots(self, shards: list[Shard], pairs: Sequence[tuple[Quantity, Quantity]]) -> torch.Tensor:
        return self.engine.dots(shards, pairs)

    def gradient_pass(
        self, rows: list[StepRow], then: Callable[[list[Shard]], None], adapter_pull: AdapterPull | None = None
    ) -> StepLosses:
        """One gradient over `rows` and what is done with it; see safecl.engine.passes.training_engine."""
        self._teachers.ask(rows)
        return self.engine.gradient_pass(rows, then, adapter_pull)

    # ----------------------------------------------------------------------------------------------------------- a task

    def screen(self, decisions: dict[str, dict]) -> None:
        """Leaves out, or weighs less, what a scan has flagged; a resumed run does it again."""
        self._read_no_further()
        self.screening = decisions
        for task in self.tasks:
            if task.config.name in decisions:
                apply_screening(self.config, task, decisions[task.config.name])

    def begin_task(self, task: TaskPlan, active: bool) -> None:
        """Fresh moments and averages; what was carried from the tasks before stays. `active` is False for the alignment
        task, which no method constrains."""
        self._read_no_further()
        self.step, self.num_steps, self.task = 0, task.num_steps, task
        self.first_step = self.global_step
        self._active = self.methods if active else []
        self.engine.optimizer.reset_moments()
        if active:
            self._remember_previous()
            self._record_teachers(task)
            self._teachers.begin_task(task.config.name)
            self._teachers.open(task.tokens_per_batch)
        if self.engine.store is not None and self.engine.store.where == "file":
            self.engine.store.check_unchanged()  # a mapped file changes under the run
        for method in self._active:
            method.start_task(self)
        if any(method.ema_decay(self) is not None for method in self._active):
            self.engine.optimizer.copy_weights_to("ema")
        self._release_reference()

    def _release_reference(self) -> None:
        """Gives the reference weights back where nothing reads them any more: the anchor has moved, the teacher is
        another model. The run's state alone says so, and a resumed run holds what the uninterrupted one holds."""
        methods_have_begun = bool(self._active) or self.global_step > 0
        if methods_have_begun and not self.engine.optimizer.reads_store and not self._teachers.read_run_store:
            self.engine.release_store()

    def end_task(self) -> None:
        self._read_no_further()
        for method in self._active:
            method.end_task(self)
        if self._active:
            self.previous = self.task

    def finish(self) -> None:
        """Removes what only a run under way needs; an older checkpoint might ask for recorded outputs until then. A
        collective call."""
        for key in list(self._recorded):
            self._recorded.pop(key).discard()
        self._teachers.close(discard=True)

    def close(self) -> None:
        """Stops reading ahead and gives back the memory of teachers, however the run ends. Not a collective call."""
        self._read_no_further()
        self._teachers.close()

    def _remember_previous(self) -> None:
        """Rows of the finished task enter the memory, with the outputs of the model that it has handed over."""
        settings = self.config.memory
        if self.previous is None or settings is None or not settings.keep_task_rows:
            return
        name = self.previous.config.name
        rows = sample_rows(self.previous.dataset, settings.keep_task_rows, self.seed)
        with_teacher = needs_outputs(self.config)
        remember(
            self.engine, self.memory, rows, settings, with_teacher=with_teacher,
            source=self.previous.config.train, task=name, step=self.global_step,
        )  # fmt: skip
        self.log(f"memory: {len(rows)} rows of {name} entered")

    def _terms(self) -> list[TaskTerm]:
        return [term for method in self._active for term in method.task_terms() if term.weight > 0]

    def _is_live(self, term: TaskTerm) -> bool:
        """With adapters, theta_0 is the model without them."""
        return self.has_adapters and term.teacher == "aligned"

    def _record_teachers(self, task: TaskPlan) -> None:
        """Before the first task theta_0 is asked about all tasks' rows: it will not be there again."""
        for term in self._terms():
            if self._is_live(term) or term.online or (task.config.name, term.name) in self._recorded:
                continue
            for each in (self.tasks or [task]) if term.teacher == "aligned" else [task]:
                folder = teacher_folder(self.config.output, each.config.name, term.name)
                recorded = record_outputs(self.engine, each.dataset, term, folder)
                self._recorded[each.config.name, term.name] = recorded
                self.log(
                    f"{term.name}: recorded the teacher's outputs on {each.config.name}, {recorded.num_bytes / 2**20:.1f} MiB"
                )

    @property
    def recorded_bytes(self) -> int:
        """What is recorded of the tasks' own rows, on the disk."""
        return sum(recorded.num_bytes for recorded in self._recorded.values())

    @property
    def saves_average(self) -> bool:
        """True where the model to evaluate and to save is the EMA."""
        return any(method.saves_average for method in self._active) and self.engine.optimizer.has("ema")

    def kept_bytes(self) -> dict[str, dict[str, int]]:
        """Bytes that the methods keep beside weights and moments, over all ranks: state by kind, recorded outputs of
        task rows, memory."""
        kinds = [
            (kind, value.nbytes)
            for shard in self.shards()
            for kind, value in shard.state.items()
            if not kind.startswith("exp_avg")
        ]
        state: dict[str, int] = {}
        for kind, num_bytes in collectives.gather_objects(kinds):
            state[kind.lstrip("_")] = state.get(kind.lstrip("_"), 0) + num_bytes
        recorded = {name: 0 for _, name in self._recorded}
        for (_, name), outputs in self._recorded.items():
            recorded[name] += outputs.num_bytes
        reference = self.engine.store.nbytes if self.engine.store is not None else 0  # on each node
        memory = self.memory.num_bytes() if self.memory is not None else {}
        return {"state": state, "recorded": recorded, "memory": memory, "reference": reference}

    # ----------------------------------------------------------------------------------------------------------- resume

    def state_dict(self) -> dict:
        """All that a resumed run must know beside the shards' state and the memory; plain values."""
        optimizer = self.engine.optimizer
        return {
            "step": self.step,
            "global_step": self.global_step,
            "skipped_steps": self.skipped_steps,
            "num_updates": optimizer.num_updates,
            "fisher_means": dict(optimizer.fisher_means),
            "active": bool(self._active),
            "previous": self.previous.config.name if self.previous is not None else None,
            "screening": self.screening,
            "recorded": [list(key) for key in self._recorded],
            "methods": {method.name: method.state_dict() for method in self.methods},
        }

    def load_state_dict(self, state: dict, task: TaskPlan) -> None:
        """Goes on in `task`, which was under way (or had ended, or not begun) when the state was taken. Shards are
        restored elsewhere."""
        self._read_no_further()
        self.screen(state["screening"])
        optimizer = self.engine.optimizer
        self.step, self.num_steps, self.task = state["step"], task.num_steps, task
        self.global_step, self.skipped_steps = state["global_step"], state["skipped_steps"]
        self.first_step = self.global_step - self.step
        optimizer.num_updates, optimizer.fisher_means = state["num_updates"], dict(state["fisher_means"])
        self._active = self.methods if state["active"] else []
        self._teachers.resume(task.config.name)
        self.previous = next((each for each in self.tasks if each.config.name == state["previous"]), None)
        for method in self.methods:
            method.load_state_dict(state["methods"][method.name])
        terms = {term.name: term for method in self.methods for term in method.task_terms()}
        for task_name, name in state["recorded"]:
            dataset = next(each.dataset for each in [*self.tasks, task] if each.config.name == task_name)
            folder = teacher_folder(self.config.output, task_name, name)
            self._recorded[task_name, name] = open_recorded(self.engine, dataset, terms[name], folder)
        self._release_reference()

    # ----------------------------------------------------------------------------------------------------------- a step

    def train_step(self, task: TaskPlan) -> StepLosses:
        """One optimizer step of the task: task rows and replay rows in one forward pass, one backward, one pass over
        the shard."""
        self._ready, self._replayed = self._take_ready(task), []
        for method in self._active:
            method.before_step(self)
        ready = self._ready.pop(TASK)
        self._teachers.ask(ready.rows)
        losses = self.engine.gradient_pass(
            ready.rows, self.engine.update(self._update_plan()), self._adapter_pull(), ready.batches
        )
        self._replayed.append((ready.rows, losses))
        self._log_replayed()
        self.step += 1
        self.global_step += 1
        return losses

    def _take_ready(self, task: TaskPlan) -> dict[str, Ready]:
        """What the current step needs, read while the step before computed."""
        if self._ahead is None:
            self._ahead = Ahead(self.engine, functools.partial(self._rows_by_gradient, task), stop=task.num_steps)
        return self._ahead.get(self.step)

    def _rows_by_gradient(self, task: TaskPlan, step: int) -> dict[str, list[StepRow]]:
        streams = [stream for method in self._active for stream in method.gradient_streams()]
        return {stream: self._gradient_rows(stream, step) for stream in streams} | {TASK: self.step_rows(task, step)}

    def _gradient_rows(self, stream: str, step: int) -> list[StepRow]:
        return self._replay_rows(stream, [ReplayTerm(stream, ce_weight=1.0)], step)

    def _read_no_further(self) -> None:
        if self._ahead is not None:
            self.waited += self._ahead.wait_seconds
            self._ahead.close()
            self._ahead = None

    def settle(self) -> None:
        """Before the memory's state is taken."""
        if self._ahead is not None:
            self._ahead.settle()

    @property
    def wait_seconds(self) -> float:
        """How long steps have waited for their rows in all, the first ones of tasks included."""
        return self.waited + (self._ahead.wait_seconds if self._ahead is not None else 0.0)

    def _log_replayed(self) -> None:
        """What the step's passes say of the memory's rows, for draws that follow it."""
        if self.memory is None or not self.memory.follows_losses or not self._active:
            return
        rows = [row for rows, _ in self._replayed for row in rows]
        own = {key: loss for _, losses in self._replayed for key, loss in losses.of_replayed_rows().items()}
        self.memory.log_losses(self.global_step, rows, own)

    def step_rows(self, task: TaskPlan, step: int | None = None) -> list[StepRow]:
        """All rows of a step of the current task (by default the next one) with their weights, the same list on every
        rank."""
        step = self.step if step is None else step
        rows = self._task_rows(task, step)
        for stream, terms in _by_stream(self._active).items():
            rows += self._replay_rows(stream, terms, step)
        return rows

    def _task_rows(self, task: TaskPlan, step: int) -> list[StepRow]:
        data, indices, terms = task.dataset, task.order.rows_of_step(step), self._terms()
        num_targets, num_tokens = max(1, int(data.num_targets[indices].sum())), max(1, int(data.lengths[indices].sum()))
        rows = dataset_rows(data, indices, 1.0 / num_targets, task.row_weights)
        totals = [num_tokens if term.divergence == HIDDEN and term.tokens == "all" else num_targets for term in terms]
        return [
            replace(
                row,
                distillations=tuple(
                    self._distance(task, int(i), term, total) for term, total in zip(terms, totals, strict=True)
                ),
            )
            for row, i in zip(rows, indices, strict=True)
        ]

    def _distance(self, task: TaskPlan, index: int, term: TaskTerm, total: int) -> Distillation:
        live, asked, load = self._is_live(term), None, None
        if term.online and not live:
            asked = self._asked(term.teacher, term.divergence, term.tokens == "all", term.k, term.temperature)
            load = asked.answer
        elif not live:
            load = functools.partial(self._recorded[task.config.name, term.name].load, index)
        return Distillation(
            term.divergence,
            term.weight / total,
            term.temperature,
            term=term.name,
            load=load,
            live=live,
            all_tokens=term.tokens == "all",
            asked=asked,
        )

    def _asked(self, source: str, divergence: str, all_tokens: bool, k: int, temperature: float) -> Asked:
        if divergence == HIDDEN:
            return Asked(source, Question("hidden", all_tokens))
        return Asked(source, Question("topk", k=min(k, self.engine.module.vocab_size), temperature=temperature))

    def _replay_rows(self, stream: str, terms: list[ReplayTerm], step: int) -> list[StepRow]:
        memory = self.config.memory
        wanted = max(1, round(memory.replay_ratio * self.task.tokens_per_batch))
        drawn = self.memory.draw(self.first_step + step, wanted, stream)
        total = max(1, sum(row.num_targets for row in drawn))
        ce_weight = sum(term.ce_weight for term in terms) / total
        if ce_weight == 0 and self.memory.follows_losses:
            ce_weight = TOO_SMALL_TO_COUNT  # the head works out the cross-entropy of what has a weight
        kd_weights = {term.divergence: 0.0 for term in terms if term.kd_weight > 0}
        for term in terms:
            if term.kd_weight > 0:
                kd_weights[term.divergence] += term.kd_weight / total
        return [row.weighted(stream, ce_weight, self._replayed_distances(kd_weights)) for row in drawn]

    def _replayed_distances(self, weights: dict[str, float]) -> tuple[Distillation, ...]:
        """Of one row, to what is stored with it or to what the online teacher says."""
        teacher = self.config.memory.teacher
        if teacher.kind == "topk" or not weights:
            return tuple(
                Distillation(divergence, weight, teacher.temperature) for divergence, weight in weights.items()
            )
        asked = self._asked(teacher.source, "topk", False, teacher.k, teacher.temperature)
        return tuple(
            Distillation(divergence, weight, teacher.temperature, load=asked.answer, asked=asked)
            for divergence, weight in weights.items()
        )

    def _adapter_pull(self) -> AdapterPull | None:
        """With LoRA a penalty of the merged weights is part of the loss."""
        penalties = [penalty for penalty in self._penalties() if penalty.product] if self.has_adapters else []
        pulls = [self._pull_of(penalty) for penalty in penalties]
        return (lambda model: sum(pull(model) for pull in pulls)) if pulls else None

    def _pull_of(self, penalty: Penalty) -> AdapterPull:
        """Made once: a Fisher is read from its file, this rank's share of it."""
        if penalty not in self._pulls:
            if penalty.fisher_file is None:
                self._pulls[penalty] = EvenPull(penalty.strength, penalty.modules)
            else:
                on_host = self.config.deepspeed.offload.fisher == "cpu"
                self._pulls[penalty] = read_fisher_pull(
                    open_fisher(penalty.fisher_file),
                    self.engine.module.model,
                    penalty.strength,
                    rank=self.engine.rank,
                    world_size=self.engine.layout.world_size,
                    device=torch.device("cpu") if on_host else self.engine.device,
                )
        return self._pulls[penalty]

    def _penalties(self) -> list[Penalty]:
        return [penalty for method in self._active if (penalty := method.penalty()) is not None]

    def _update_plan(self) -> UpdatePlan:
        train = self.config.train
        self.last_learning_rate = learning_rate(train, self.step, self.num_steps)
        decays = [decay for method in self._active if (decay := method.ema_decay(self)) is not None]
        return UpdatePlan(
            lr=self.last_learning_rate,
            clip_norm=train.clip_norm,
            clip_scope=train.clip_scope,
            penalties=[penalty for penalty in self._penalties() if not (penalty.product and self.has_adapters)],
            ema_decay=decays[0] if decays else None,
            ema_mask=next((mask for method in self._active if (mask := method.ema_mask()) is not None), None),
            transforms=self._hooks("transform_gradient"),
            after_update=self._hooks("after_update"),
        )

    def _hooks(self, name: str) -> list[Callable[[list[Shard]], None]]:
        """The hooks that the active methods really define, as functions of the shards."""
        methods = [m for m in self._active if getattr(type(m), name) is not getattr(Method, name)]
        return [functools.partial(getattr(m, name), self) for m in methods]


def dataset_rows(
    data: TokenDataset, indices: np.ndarray, ce_weight: float, row_weights: np.ndarray | None = None
) -> list[StepRow]:
    """These rows of a data set as rows of a step; `row_weights` [N] multiply the weight of single rows."""
    sizes = zip(indices.tolist(), data.lengths[indices].tolist(), data.num_targets[indices].tolist(), strict=True)
    weights = [ce_weight * (1.0 if row_weights is None else float(row_weights[i])) for i in indices]
    return [
        StepRow(TASK, length, targets, lambda i=i: (data.row(i), None), weight)
        for (i, length, targets), weight in zip(sizes, weights, strict=True)
    ]


def _by_stream(methods: list[Method]) -> dict[str, list[ReplayTerm]]:
    """Replay terms of one stream share their rows."""
    streams: dict[str, list[ReplayTerm]] = {}
    for method in methods:
        for term in method.replay_terms():
            if term.ce_weight or term.kd_weight or term.stream not in streams:
                streams.setdefault(term.stream, []).append(term)
    return streams
