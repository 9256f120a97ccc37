"""Makes the plan of a run before a model is loaded and before a process group exists: rows, steps, prompts, checks.

`safecl check` prints the plan and `Trainer` runs it, so the two cannot differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from safecl.config import RunConfig, TaskConfig
from safecl.config.method_registry import method_module
from safecl.data import load_tokenizer, read_prompts, resolve_tokens_per_batch
from safecl.data.config_rows import prepare_harmful, prepare_memory, prepare_task, read_training_rows, read_upload_rows
from safecl.data.reading.files import where
from safecl.data.templates.thinking import check_thinking
from safecl.data.templates.written import notes_on_prompts
from safecl.engine.teachers.checks import check_teachers
from safecl.evaluation import check_disjoint, check_gate_is_decidable, find_overlaps, load_scorer
from safecl.evaluation.answers.texts import place_of, under_system
from safecl.evaluation.questions import read_held_out
from safecl.methods.base import Method
from safecl.planning.checks import check_backend, check_fisher, check_scan, check_sizes, check_trackers
from safecl.planning.given_scores import check_given_scores
from safecl.planning.memory_kinds import check_shares
from safecl.planning.merge_checks import check_merges
from safecl.planning.model_checks import check_model
from safecl.planning.plans import RunPlan, TaskPlan, order_of_rows, replace_rows
from safecl.storage.model_records import ModelRecords

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def plan_run(config: RunConfig) -> RunPlan:
    """Read and tokenise all data, check it, and compute the steps. Raises ConfigError (DataError for rows)."""
    check_trackers(config.log.report_to)
    check_merges(config)
    check_backend(config.safety)
    tokenizer = load_tokenizer(config.model, records=ModelRecords.of(config))
    check_thinking(tokenizer)
    tasks = [_plan_task(config, task, tokenizer) for task in config.tasks]
    plan = RunPlan(config, tokenizer, tasks, build_methods(config))
    check_given_scores(plan.methods, tasks)
    if config.memory is not None:
        plan.memory = prepare_memory(config, tokenizer)
        plan.notes += check_shares(config.memory, plan.memory, tokenizer)
    plan.harmful = prepare_harmful(config, tokenizer)
    _plan_safety(plan)
    check_scan(plan)
    _note_what_is_not_used(plan)
    check_sizes(plan)
    check_model(plan)
    check_fisher(config)
    check_teachers(config, tokenizer)
    return plan


def _note_what_is_not_used(plan: RunPlan) -> None:
    """Note what of memory rows and prompts the run does not use; the summary of a task's rows has notes of its own."""
    if plan.memory is not None:
        plan.notes += [f"memory: {note}" for report in plan.memory.reports for note in report.notes]
    rows = [row for task in plan.tasks for row in task.eval_rows]
    privacy = plan.config.privacy.examples
    plan.notes += notes_on_prompts(plan.tokenizer, [*plan.prompts, *plan.benign], rows, privacy)


def build_methods(config: RunConfig) -> list[Method[Any]]:
    """Return the methods of the config, in its order."""
    return [method_module(name).Method(name, settings) for name, settings in config.methods.items()]


def _plan_task(config: RunConfig, task: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> TaskPlan:
    train = config.train
    dataset, poisoned = prepare_task(config, task, tokenizer)
    tokens_per_batch = resolve_tokens_per_batch(train, dataset)
    return TaskPlan(
        config=task,
        dataset=dataset,
        tokens_per_batch=tokens_per_batch,
        order=order_of_rows(train, dataset, tokens_per_batch),
        eval_rows=read_held_out(config.safety, task.eval, task.fields),
        poisoned_rows=poisoned,
    )


def _plan_safety(plan: RunPlan) -> None:
    """Read the evaluation prompts. Refuse a gate that they cannot decide, and prompts that the run would train on."""
    config = plan.config
    safety = config.safety
    if safety is None:
        return
    load_scorer(safety.scorer)
    plan.prompts = under_system(safety.system, read_prompts(safety.prompts, safety.max_prompts))
    if safety.benign_prompts is not None:
        benign = read_prompts(safety.benign_prompts, safety.max_prompts, only_safe=True)
        plan.benign = under_system(safety.system, benign)
    if safety.gate is not None:
        check_gate_is_decidable(
            safety.gate,
            num_prompts=len(plan.prompts),
            num_benign=len(plan.benign),
            prompts=plan.prompts,
            benign=plan.benign,
        )
    acts_on_rows = config.scan is not None and config.scan.action in ("drop", "downweight")
    left_out = _leave_out_repeats(plan) if acts_on_rows else set()
    rows = [row for row in read_training_rows(config) if place_of(row) not in left_out]
    check_disjoint([*plan.prompts, *plan.benign], rows)


def _leave_out_repeats(plan: RunPlan) -> set[str]:
    """Leave uploaded rows that repeat an evaluation prompt out of the tasks. Returns their places (file and line)."""
    places = {overlap.row for overlap in find_overlaps([*plan.prompts, *plan.benign], read_upload_rows(plan.config))}
    for task in plan.tasks:
        data, lines = task.dataset, task.dataset.lines.tolist()
        stays = np.array(
            [task.config.role == "align" or where(data.path(i), lines[i]) not in places for i in range(len(data))]
        )
        if not stays.all():
            replace_rows(plan.config, task, data.select(np.flatnonzero(stays)))
            task.repeated_rows = count = int((~stays).sum())
            name = task.config.name
            plan.notes.append(f"scan: {count} rows of task {name} repeat evaluation prompts and are left out")
    return places
