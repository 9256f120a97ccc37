"""Chooses a task's merge with the aligned model: measures many settings, and keeps the best that passes the gate."""

from __future__ import annotations

import json

from safecl.config.base import MergeAtTheEnd
from safecl.distributed import collectives
from safecl.merging.choice import Measured, best_that_passes, pareto_front
from safecl.merging.points import parse_sweeps, text_of
from safecl.planning.merge_checks import sweeps_of
from safecl.storage.durable import replace_file
from safecl.training.end_merge import EndMerge, merges_of
from safecl.training.guard.measuring import Measurements
from safecl.training.run import Run


def merge_by_gate(run: Run, measured: Measurements) -> None:
    """Do the merges of the current task that a gate chooses. A collective call."""
    for merge in merges_of(run):
        if merge.pick is not None:
            _choose(run, merge, measured)


def _choose(run: Run, merge: MergeAtTheEnd, measured: Measurements) -> None:
    """Measure all points, and leave the best in the weights; where none passes, the weights stay as trained."""
    assert run.task is not None, "a task has just ended"
    work, found = EndMerge(run, merge, keep=True), []
    for point in parse_sweeps(list(sweeps_of(merge))):
        work.apply(point)
        evaluation = measured.ask(run, f"{run.task.config.name} {merge.kind} {text_of(point)}")
        assert evaluation is not None, "a gate has prompts"
        run.log(evaluation.one_line())
        found.append(Measured(point, evaluation, measured.judge(evaluation)))
    picked = best_that_passes(found)
    if picked is None:
        work.restore()
        run.log(f"merge at the end: no point of {merge.kind} passes the gate; the weights stay as trained")
    else:
        work.apply(found[picked].settings)
        run.log(f"merge at the end: {merge.kind} {text_of(found[picked].settings)}, the best that passes the gate")
    _write(run, merge, measured, found, picked)


def _write(run: Run, merge: MergeAtTheEnd, measured: Measurements, found: list[Measured], picked: int | None) -> None:
    """Write what was measured to outputs/, on rank 0."""
    if collectives.rank() != 0 or run.task is None:
        return
    content = {
        "kind": merge.kind,
        "settings": dict(merge.settings),
        "points": [point.to_dict() for point in found],
        "front": pareto_front(found),
        "picked": picked,
    }
    folder = measured.folder / "outputs"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{run.global_step:06d}-merge-back-{run.task.config.name}.json"
    replace_file(folder / name, json.dumps(content, indent=2) + "\n")
