"""Tells why a step was skipped, and whether the state of a run has values that are not finite (NaN or infinite).

A gradient that is not finite is skipped before anything is changed. `cause_of_skip` then names the terms of the loss,
the ranks and the rows. A gradient may be finite and the state not: a Fisher with NaN, or an update that overflows.
The pass over the shard counts what it writes that is not finite; `fault_in_state` says what it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch

from safecl.data import TokenDataset
from safecl.data.reading.files import where
from safecl.distributed import collectives
from safecl.engine.passes.micro_batches import split_step
from safecl.engine.passes.step_losses import StepLosses
from safecl.engine.passes.step_rows import StepRow
from safecl.engine.zero.nonfinite import MOMENTS, WEIGHTS, NonFinite, nonfinite_state
from safecl.planning.plans import TaskPlan
from safecl.training.run import Run

MOST_NAMED = 8
_EMA = "ema"
_NAMES = {
    WEIGHTS: "the weights hold",
    "exp_avg": "AdamW's first moments hold",
    "exp_avg_sq": "AdamW's second moments hold",
    _EMA: "the average of the weights (ema) holds",
}
_HINTS = {
    WEIGHTS: "try a lower train.learning_rate",
    "exp_avg": "try train.clip_norm: 1.0 or a lower train.learning_rate",
    "exp_avg_sq": "try train.clip_norm: 1.0 or a lower train.learning_rate",
}


# ---------------------------------------------------------------------------------------------------------------- state


def fault_in_state(run: Run, kinds: Collection[str] | None = None) -> str | None:
    """Describe the state that is not finite, and what helps; None where all of it is finite. A collective call.

    What a step only reads (Fisher, anchor) is named alone: all that it is multiplied with is not finite, either.
    """
    found = nonfinite_state(run.engine.shards, run.engine.optimizer, kinds)
    causes = [one for one in found if one.kind not in (WEIGHTS, *MOMENTS, _EMA)]
    causes = causes or [one for one in found if one.kind in MOMENTS] or found
    if not causes:
        return None
    hints = dict.fromkeys(_HINTS[one.kind] for one in causes if one.kind in _HINTS)
    alone = [one.ranks for one in causes if run.engine.shards.replicated and len(one.ranks) < collectives.world_size()]
    if alone:
        hints = dict.fromkeys([f"the replica of rank {alone[0][0]} differs from the others: look at its device"])
    return "; ".join([*map(_described, causes), *hints])


def _described(one: NonFinite) -> str:
    holds = _NAMES.get(one.kind, f"the state {one.kind} holds")
    return f"{holds} {_values(one.count)} not finite (NaN or infinite), the first in {one.parameter}"


def _values(count: int) -> str:
    return "one value that is" if count == 1 else f"{count:,} values that are"


# --------------------------------------------------------------------------------------------------------------- a skip


@dataclass(frozen=True)
class _Guilty:
    """A term of the loss that is not finite on a rank, and the places of its rows, where they are known."""

    rank: int
    term: str
    places: tuple[str, ...]


def cause_of_skip(run: Run, task: TaskPlan) -> str:
    """Name the terms, ranks and rows (file and line) whose losses are not finite in the step that was just skipped. A
    collective call."""
    own = [found for rows, losses in run.passes for found in _guilty(run, task, rows, losses)]
    guilty = collectives.gather_objects(own)
    if guilty:
        return "; ".join(map(_sentence, guilty))
    norm = run.engine.optimizer.result.grad_norm
    finite = norm is not None and bool(torch.isfinite(norm))
    norms = collectives.gather_objects([finite])
    if any(norms):
        ranks = ", ".join(str(rank) for rank, is_finite in enumerate(norms) if not is_finite)
        return f"every loss is finite, and the gradient only on some ranks, not on rank {ranks}: look at its device"
    places = _places(run, task, [row for rows, _ in run.passes for row in rows])
    return f"every loss is finite, so the backward pass overflowed; the step's rows are {_shown(places)}"


def _sentence(guilty: _Guilty) -> str:
    rows = f", in {_shown(guilty.places)}" if guilty.places else ""
    return f"the loss {guilty.term} is not finite on rank {guilty.rank}{rows}"


def _shown(places: Sequence[str]) -> str:
    return ", ".join(places[:MOST_NAMED]) + (", ..." if len(places) > MOST_NAMED else "")


def _guilty(run: Run, task: TaskPlan, rows: list[StepRow], losses: StepLosses) -> list[_Guilty]:
    """Find this rank's terms that are not finite in one pass."""
    engine = run.engine
    parts = split_step(rows, engine.layout)[engine.rank]
    found = losses.not_finite()
    return [
        _Guilty(engine.rank, term, tuple(_places(run, task, [rows[parts[batch][n]] for batch, n in numbers])))
        for term, numbers in found.items()
    ]


def _places(run: Run, task: TaskPlan, rows: Iterable[StepRow]) -> list[str]:
    """The file and line of rows: of the task, by their place in its data set; of the memory, by their ids."""
    datasets = [*([run.plan.memory] if run.plan is not None and run.plan.memory is not None else [])]
    datasets += [each.dataset for each in [*run.tasks, task]]
    return list(dict.fromkeys(place for row in rows if (place := _place(run, task, datasets, row)) is not None))


def _place(run: Run, task: TaskPlan, datasets: list[TokenDataset], row: StepRow) -> str | None:
    if row.index is not None:
        return where(task.dataset.path(row.index), int(task.dataset.lines[row.index]))
    if row.key is None or run.memory is None:
        return None
    row_id = int(run.memory.buffer.row_ids([row.key])[0])
    for data in datasets:
        if len(found := (data.row_ids == row_id).nonzero()[0]):
            return where(data.path(int(found[0])), int(data.lines[found[0]]))
    return f"row {row.key} of the memory"
