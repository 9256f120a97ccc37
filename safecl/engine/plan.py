"""What a run will do, worked out before any model is loaded or any process group exists: rows, steps, tokens, and what is measured.

`safecl check` prints it, `Trainer` runs it, so the two cannot differ.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from safecl import launcher
from safecl.config import ConfigError, EvalConfig, RunConfig, TaskConfig, TrainConfig
from safecl.data import (
    ChatRow,
    Prompt,
    TaskOrder,
    TokenDataset,
    load_tokenizer,
    mix_poison,
    prepare_dataset,
    read_prompts,
    read_rows,
    resolve_tokens_per_batch,
)
from safecl.data.files import where
from safecl.engine.plan_teachers import check_teachers, teacher_lines
from safecl.evaluation.texts import place_of
from safecl.methods import method_module
from safecl.methods.base import Method

FEW_STEPS = 50
HALF = 0.5


@dataclass
class TaskPlan:
    """One task: its rows, how many go into a step, and its held-out rows."""

    config: TaskConfig
    dataset: TokenDataset
    tokens_per_batch: int
    order: TaskOrder
    eval_rows: list[ChatRow] = field(default_factory=list)
    poisoned_rows: int = 0
    row_weights: np.ndarray | None = None
    """fp32 [rows]: what a row's cross-entropy is multiplied by; None is 1 everywhere."""

    @property
    def num_steps(self) -> int:
        return self.order.num_steps


@dataclass
class RunPlan:
    """A run, ready to start."""

    config: RunConfig
    tokenizer: object
    tasks: list[TaskPlan]
    methods: list[Method]
    memory: TokenDataset | None = None
    prompts: list[Prompt] = field(default_factory=list)
    benign: list[Prompt] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What a user should know before the run starts."""


def data_cache() -> Path:
    """Folder of prepared data: $SAFECL_CACHE/data, by default ~/.cache/safecl/data."""
    return Path(os.environ.get("SAFECL_CACHE", Path.home() / ".cache" / "safecl")) / "data"


def plan_run(config: RunConfig) -> RunPlan:
    """Reads and tokenises all data, checks it, and works out steps. Raises ConfigError (DataError for rows)."""
    tokenizer = load_tokenizer(config.model)
    plan = RunPlan(config, tokenizer, [_plan_task(config, task, tokenizer) for task in config.tasks], build_methods(config))
    plan.memory = prepare_memory(config, tokenizer) if config.memory is not None else None
    _plan_safety(plan)
    _check_sizes(plan)
    _check_vocabulary(plan)
    _check_fisher(config)
    check_teachers(config, tokenizer)
    return plan


def build_methods(config: RunConfig) -> list[Method]:
    """The configured methods, in the order of the config."""
    return [method_module(name).Method(name, settings) for name, settings in config.methods.items()]


def _prepare(config: RunConfig, path: str, section, tokenizer, max_length: int) -> TokenDataset:
    return prepare_dataset(
        path, split=getattr(section, "split", "train"), format=section.format, fields=section.fields,
        max_rows=getattr(section, "max_rows", None), max_bad_rows=config.train.max_bad_rows, tokenizer=tokenizer, max_length=max_length,
        cache_dir=data_cache(),
    )  # fmt: skip


def memory_tokens(config: RunConfig) -> int:
    """What the memory's rows are cut to."""
    return min(config.memory.max_tokens, config.train.max_length)


def prepare_memory(config: RunConfig, tokenizer) -> TokenDataset:
    """The rows of memory.source. Raises ConfigError (DataError for rows)."""
    return _prepare(config, config.memory.source, config.memory, tokenizer, max_length=memory_tokens(config))


def _plan_task(config: RunConfig, task: TaskConfig, tokenizer) -> TaskPlan:
    train = config.train
    dataset, poisoned = prepare_task(config, task, tokenizer)
    tokens_per_batch = resolve_tokens_per_batch(train, dataset)
    return TaskPlan(config=task, dataset=dataset, tokens_per_batch=tokens_per_batch, order=_order(train, dataset, tokens_per_batch),
                    eval_rows=_eval_rows(task, task.eval), poisoned_rows=poisoned)  # fmt: skip


def prepare_task(config: RunConfig, task: TaskConfig, tokenizer) -> tuple[TokenDataset, int]:
    """The task's rows, poison mixed in where the config says so, and how many of them are poisoned."""
    poison, max_length = config.poison, config.train.max_length
    dataset = _prepare(config, task.train, task, tokenizer, max_length)
    if poison.ratio == 0 or task.role == "align":
        return dataset, 0
    mixed = mix_poison(dataset, _prepare(config, poison.source, poison, tokenizer, max_length), poison.ratio, poison.seed)
    return mixed, len(mixed) - len(dataset)


def _eval_rows(task: TaskConfig, eval_config: EvalConfig | None) -> list[ChatRow]:
    if eval_config is None:
        return []
    fields = eval_config.fields or task.fields
    form = "fields" if fields is not None and eval_config.format == "auto" else eval_config.format
    rows, _ = read_rows(eval_config.path, format=form, fields=fields, max_rows=eval_config.max_rows)
    return rows


def _plan_safety(plan: RunPlan) -> None:
    from safecl.evaluation import check_disjoint, check_gate_is_decidable

    safety = plan.config.safety
    if safety is None:
        return
    plan.prompts = read_prompts(safety.prompts, safety.max_prompts)
    if safety.benign_prompts is not None:
        plan.benign = read_prompts(safety.benign_prompts, safety.max_prompts, only_safe=True)
    if safety.gate is not None:
        check_gate_is_decidable(safety.gate, num_prompts=len(plan.prompts), num_benign=len(plan.benign))
    left_out = _leave_out_repeats(plan) if plan.config.scan is not None and plan.config.scan.action in ("drop", "downweight") else set()
    rows = [row for row in _training_rows(plan.config) if place_of(row) not in left_out]
    check_disjoint([*plan.prompts, *plan.benign], rows)


def _leave_out_repeats(plan: RunPlan) -> set[str]:
    """Takes uploaded rows that repeat an evaluation prompt out of the tasks; returns where they stand."""
    from safecl.evaluation import find_overlaps
    from safecl.scan.duplicates import upload_rows

    places = {overlap.row for overlap in find_overlaps([*plan.prompts, *plan.benign], upload_rows(plan.config))}
    for task in plan.tasks:
        data, lines = task.dataset, task.dataset.lines.tolist()
        stays = np.array([task.config.role == "align" or where(data.path(i), lines[i]) not in places for i in range(len(data))])
        if not stays.all():
            _retake(plan.config, task, data.select(np.flatnonzero(stays)))
            plan.notes.append(f"scan: {int((~stays).sum())} rows of task {task.config.name} repeat evaluation prompts and are left out")
    return places


def apply_screening(config: RunConfig, task: TaskPlan, decision: dict[str, Any]) -> None:
    """Leaves flagged rows out of a task, or lowers their weight. decision: {"rows": row ids, "weight": factor, 0 leaves out}."""
    flagged = np.isin(task.dataset.row_ids, np.array(decision["rows"], np.uint64))
    if decision["weight"] == 0.0:
        _retake(config, task, task.dataset.select(np.flatnonzero(~flagged)))
    else:
        task.row_weights = np.where(flagged, decision["weight"], 1.0).astype(np.float32)


def _retake(config: RunConfig, task: TaskPlan, dataset: TokenDataset) -> None:
    """Goes on with fewer rows: as many epochs of batches of the same size, or as many steps."""
    if len(dataset) == 0:
        raise ConfigError(f"scan: every row of task {task.config.name} is flagged, so nothing is left to train on")
    task.dataset, task.order = dataset, _order(config.train, dataset, task.tokens_per_batch)


def _order(train: TrainConfig, dataset: TokenDataset, tokens_per_batch: int) -> TaskOrder:
    length = {"epochs": train.epochs} if train.max_steps is None else {"max_steps": train.max_steps}
    return TaskOrder(dataset, seed=train.seed, tokens_per_batch=tokens_per_batch, **length)


def _training_rows(config: RunConfig) -> list[ChatRow]:
    """All rows that the model will see, for the check that no evaluation prompt is among them."""
    rows: list[ChatRow] = []
    sources = [(task.train, task) for task in config.tasks]
    if config.memory is not None:
        sources.append((config.memory.source, config.memory))
    if config.poison.ratio > 0:
        sources.append((config.poison.source, config.poison))
    for path, section in sources:
        found, _ = read_rows(path, split=getattr(section, "split", "train"), format=section.format, fields=section.fields,
                             max_rows=getattr(section, "max_rows", None), max_bad_rows=config.train.max_bad_rows)  # fmt: skip
        rows += found
    return rows


def _check_vocabulary(plan: RunPlan) -> None:
    """A tokenizer that knows more than the model would end in an index error inside the embedding."""
    from safecl.engine.model import read_model_settings

    vocabulary = read_model_settings(plan.config.model).get_text_config().vocab_size
    for data in [*(task.dataset for task in plan.tasks), *([plan.memory] if plan.memory is not None else [])]:
        if data.max_token_id >= vocabulary:
            raise ConfigError(
                f"model.tokenizer: token id {data.max_token_id} occurs in {data.path(0)}, but the model knows only {vocabulary:,} tokens; "
                "use the model's own tokenizer"
            )


def _check_fisher(config: RunConfig) -> None:
    """A Fisher of another model would hold still the wrong weights, silently."""
    from safecl.engine.artifacts import ArtifactStore, model_hash
    from safecl.engine.fisher_file import open_fisher, refuse_other_model

    for name, settings in config.methods.items():
        if (path := getattr(settings, "fisher", None)) is None:
            continue
        if config.tasks[0].role == "align":
            raise ConfigError(f"methods.{name}.fisher: the aligned model is what the first task (role: align) makes; leave `fisher` out")
        fisher = open_fisher(path)
        if launcher.rank() == 0:  # it reads the whole model; where it fails the launcher ends all ranks
            refuse_other_model(fisher, config.model.path, model_hash(config.model.path, ArtifactStore.of(config)))


def _check_sizes(plan: RunPlan) -> None:
    """A run that could not do what it is for needs an explicit flag: too few steps, or an average that mostly holds the start."""
    allow = plan.config.train.allow_few_steps
    for task in plan.tasks:
        if task.config.role == "align":
            continue
        steps, name = task.num_steps, task.config.name
        if steps < FEW_STEPS:
            fix = "use smaller train.tokens_per_batch or more train.epochs"
            _refuse_or_note(plan, allow, f"task {name}: only {steps} optimizer steps; {fix}")
        for method_name, settings in plan.config.methods.items():
            weight = settings.weight_on_start(steps) if hasattr(settings, "weight_on_start") else 0.0
            if weight > HALF:
                fix = f"use methods.{method_name}.horizon: 0.3 instead of decay, or more steps"
                problem = f"after {steps} steps the average keeps {weight:.0%} of its weight on the start"
                _refuse_or_note(plan, allow, f"task {name}: {problem}; {fix}")


def _refuse_or_note(plan: RunPlan, allow: bool, message: str) -> None:
    if not allow:
        raise ConfigError(f"{message}, or accept it with train.allow_few_steps: true")
    plan.notes.append(message)


def describe_plan(plan: RunPlan) -> list[tuple[str, str]]:
    """(what, value) lines of the plan, for `safecl check` and for the start of a run."""
    config = plan.config
    lines = [("model", f"{config.model.path}, {config.model.dtype}" + (", LoRA" if config.model.lora else ""))]
    for task in plan.tasks:
        data, name = task.dataset, task.config.name
        rows = f"{len(data):,} rows" + (f" ({task.poisoned_rows:,} poisoned)" if task.poisoned_rows else "")
        targets, tokens = int(data.num_targets.sum()), int(data.lengths.sum())
        lines.append((f"task {name}", f"{rows}, {tokens:,} tokens, {targets / max(tokens, 1):.0%} supervised"))
        epochs = task.num_steps * task.tokens_per_batch / max(tokens, 1)
        lines.append(("  steps", f"{task.num_steps:,} of about {task.tokens_per_batch:,} tokens, {epochs:.2g} epochs"))
        if task.config.role != "align":
            lines += [(f"  {label}", text) for label, text in _method_lines(plan, task.num_steps)]
    if plan.memory is not None:
        tokens = int(plan.memory.lengths.sum())
        lines.append(("memory", f"{len(plan.memory):,} rows, {tokens:,} tokens, ratio {config.memory.replay_ratio:g} per draw"))
    lines += teacher_lines(config, max(task.tokens_per_batch for task in plan.tasks))
    if (scan := config.scan) is not None:
        source = f"by {scan.benign}" if scan.benign else "wanted, as far as the upload itself tells (scan.benign would tell)"
        lines.append(("scan", f"{scan.action}, {scan.false_alarm:.2%} false alarms {source}"))
    if plan.prompts:
        lines.append(("safety", f"{len(plan.prompts)} disallowed, {len(plan.benign)} benign prompts, every {config.safety.every}"))
    optimizer, weights = _place(config.deepspeed.offload.optimizer), _place(config.deepspeed.offload.parameters)
    lines.append(("ZeRO", f"stage {config.deepspeed.stage}, optimizer on {optimizer}, weights on {weights}"))
    return lines


def _method_lines(plan: RunPlan, num_steps: int) -> list[tuple[str, str]]:
    if not plan.config.methods:
        return [("method", "plain fine-tuning")]
    lines = []
    for name, settings in plan.config.methods.items():
        values = ", ".join(f"{key} {_short(value)}" for key, value in settings if value is not None)
        if getattr(settings, "keeps_average", False):
            values += f"; decay {settings.decay_for(num_steps):.6g} leaves {settings.weight_on_start(num_steps):.1%} on the start"
        lines.append((name, values))
    return lines


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _place(offload: str) -> str:
    return "CPU" if offload == "cpu" else "device"
