"""The model card of a run, made from the run's state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safecl.evaluation import Evaluation, GateResult
from safecl.planning.plans import RunPlan, TaskPlan
from safecl.report.card import Card, TrainedOn
from safecl.report.visible import one_line
from safecl.training.steps.state import RunState


def card_of(
    run: RunState,
    plan: RunPlan,
    name: str,
    identity: dict[str, Any],
    num_tokens: int,
    evaluations: Sequence[Evaluation],
    gate: GateResult | None,
    skipped: str | None = None,
) -> Card:
    """Return the card of the run's last weights.

    name: the run's name. identity: see safecl.training.identity, with the base model's hash. num_tokens: tokens trained
    on. skipped: a sentence about skipped steps.
    """
    data = [_of_task(run, task, identity["rows"][task.config.name]) for task in plan.tasks]
    if plan.memory is not None and (memory := plan.config.memory) is not None:
        ratio = f"{memory.replay_ratio:g} of a step's tokens replayed per draw"
        data.append(TrainedOn("memory", memory.origin, len(plan.memory), identity["memory_rows"], ratio))
    return Card(
        name,
        plan.config,
        identity["base"],
        data,
        run.global_step,
        num_tokens,
        identity["versions"],
        list(evaluations),
        gate,
        skipped=skipped,
    )


def _of_task(run: RunState, task: TaskPlan, fingerprint: str) -> TrainedOn:
    notes = [f"{task.poisoned_rows:,} of them poison that was mixed in on purpose"] if task.poisoned_rows else []
    if (decision := run.screening.get(task.config.name)) is not None:
        what = "left out" if decision["weight"] == 0.0 else f"of weight {decision['weight']:g}"
        notes.append(f"{len(decision['rows']):,} flagged rows {what}")
    role = " (alignment)" if task.config.role == "align" else ""
    return TrainedOn(
        f"task `{one_line(task.config.name)}`{role}",
        task.config.train,
        len(task.dataset),
        fingerprint,
        "; ".join(notes),
    )
