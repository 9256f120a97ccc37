"""What a run's model card is made of, from the run's own state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from safecl.evaluation import Evaluation, GateResult
from safecl.report.card import Card, TrainedOn
from safecl.training.run import Run

if TYPE_CHECKING:
    from safecl.planning.plans import RunPlan, TaskPlan


def card_of(
    run: Run,
    name: str,
    identity: dict[str, Any],
    num_tokens: int,
    evaluations: Sequence[Evaluation],
    gate: GateResult | None,
) -> Card:
    """The card of the run's last weights. `identity`: see run_identity.identity_of, with the base model's digest."""
    plan = run.plan
    data = [_of_task(run, task, identity["rows"][task.config.name]) for task in plan.tasks]
    if plan.memory is not None:
        data.append(
            TrainedOn("memory", plan.config.memory.source, len(plan.memory), identity["memory_rows"], _ratio(plan))
        )
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
    )


def _of_task(run: Run, task: TaskPlan, fingerprint: str) -> TrainedOn:
    notes = [f"{task.poisoned_rows:,} of them poison that was mixed in on purpose"] if task.poisoned_rows else []
    if (decision := run.screening.get(task.config.name)) is not None:
        what = "left out" if decision["weight"] == 0.0 else f"of weight {decision['weight']:g}"
        notes.append(f"{len(decision['rows']):,} flagged rows {what}")
    role = " (alignment)" if task.config.role == "align" else ""
    return TrainedOn(
        f"task `{task.config.name}`{role}", task.config.train, len(task.dataset), fingerprint, "; ".join(notes)
    )


def _ratio(plan: RunPlan) -> str:
    return f"{plan.config.memory.replay_ratio:g} of a step's tokens replayed per draw"
