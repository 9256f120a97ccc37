"""The whole course of a run in numbers: its worst moments, transfer between tasks, time beyond the gate, the probe.

The matrix of scores has a row per task that was finished and a column per such task; see statistics/continual.py for
what is made of it. A score is the metric, or its negative where lower is better.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from safecl.evaluation.results.moment import Evaluation
from safecl.evaluation.results.probed import probe_summary
from safecl.evaluation.statistics.continual import (
    average_score,
    backward_transfer,
    forgetting,
    forward_transfer,
    min_accuracy,
    windowed_forgetting,
    worst_case_accuracy,
)

AFTER, CORRECTED = "after ", "corrected "
WINDOW = 10
"""Consecutive evaluations within which a drop counts as windowed forgetting (WF10 of De Lange et al. 2023)."""


def summarise(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Compute worst moments and transfer over a run: `{"max_asr", "max_asr_when", "min_scores", "average",
    "backward_transfer", "forgetting", ...}`.

    Forward transfer is against the run's first moment. Values are None where nothing was measured; `beyond_gate` and
    `probe` are absent without a gate and without a probe.
    """
    finished = _finished(evaluations)
    rates = [
        (evaluation.safety.asr.value, evaluation.when)
        for evaluation in evaluations
        if evaluation.safety is not None and math.isfinite(evaluation.safety.asr.value)
    ]
    worst = max(rates, key=lambda pair: pair[0], default=(None, None))
    matrix = [[_score(evaluation, task) for task in finished] for evaluation in finished.values()]
    summary: dict[str, Any] = {
        "max_asr": worst[0],
        "max_asr_when": worst[1],
        "min_scores": _min_scores(evaluations),
        "tasks": list(finished),
        "scores": matrix,
    }
    if worst_of_variants := _worst_of_variants(evaluations):
        summary["max_asr_of_variants"] = worst_of_variants
    if any(evaluation.gate is not None for evaluation in evaluations):
        summary["beyond_gate"] = _beyond_gate(evaluations)
    if (probe := probe_summary([each.probe for each in evaluations if each.probe is not None])) is not None:
        summary["probe"] = probe
    return summary | (_transfer(evaluations, finished, matrix) if finished else {})


def _worst_of_variants(evaluations: Sequence[Evaluation]) -> dict[str, dict[str, Any]]:
    """Return the largest attack success rate of each of `safety.variants`, and when it was measured."""
    worst: dict[str, dict[str, Any]] = {}
    for evaluation in evaluations:
        for name, found in evaluation.safety.variants.items() if evaluation.safety is not None else ():
            value = found.asr.value
            if math.isfinite(value) and (name not in worst or value > worst[name]["value"]):
                worst[name] = {"value": value, "when": evaluation.when}
    return worst


def _finished(evaluations: Sequence[Evaluation]) -> dict[str, Evaluation]:
    """Return the last measurement at the end of each task, in the order of the tasks."""
    ends: dict[str, Evaluation] = {}
    for evaluation in evaluations:
        for prefix in (AFTER, CORRECTED):
            name = evaluation.when.removeprefix(prefix)
            if name != evaluation.when and (prefix == AFTER or name in ends):
                ends[name] = evaluation
    return ends


def _transfer(
    evaluations: Sequence[Evaluation], finished: Mapping[str, Evaluation], matrix: list[list[float | None]]
) -> dict[str, Any]:
    tasks = list(finished)
    course = [[_score(evaluation, task) for task in tasks] for evaluation in evaluations]
    ends = [next(i for i, each in enumerate(evaluations) if each is finished[task]) for task in tasks]
    dropped = [windowed_forgetting([row[j] for row in course], WINDOW) for j in range(len(tasks))]
    known = [drop for drop in dropped if drop is not None]
    return {
        "average": average_score(matrix),
        "backward_transfer": backward_transfer(matrix),
        "forward_transfer": forward_transfer(matrix, course[0]),
        "forgetting": forgetting(matrix),
        "min_accuracy": dict(zip(tasks, min_accuracy(course, ends), strict=True)),
        "worst_case_accuracy": worst_case_accuracy(course, ends, len(tasks) - 1),
        "windowed_forgetting": sum(known) / len(known) if known else None,
    }


def _min_scores(evaluations: Sequence[Evaluation]) -> dict[str, dict[str, Any]]:
    """Return each task's worst value over all moments after the first, and when it was measured."""
    worst: dict[str, tuple[float, dict[str, Any]]] = {}
    for evaluation in evaluations[1:]:
        for name, result in evaluation.tasks.items():
            score = _score(evaluation, name)
            if score is not None and math.isfinite(score) and (name not in worst or score < worst[name][0]):
                worst[name] = score, {"value": result.value.value, "when": evaluation.when}
    return {name: found for name, (_, found) in worst.items()}


def _beyond_gate(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Return the moments at which the gate failed, and the steps until the next measurements, as a number and as a
    share of all."""
    failed = [evaluation.gate is not None and evaluation.gate.verdict == "failed" for evaluation in evaluations]
    spans = [max(0, b.step - a.step) for a, b in itertools.pairwise(evaluations)]
    steps = sum(span for span, beyond in zip(spans, failed, strict=False) if beyond)
    share = steps / sum(spans) if sum(spans) else None
    return {"moments": sum(failed), "of_moments": len(failed), "steps": steps, "share": share}


def _score(evaluation: Evaluation, task: str) -> float | None:
    result = evaluation.tasks.get(task)
    if result is None:
        return None
    return result.value.value if result.higher_is_better else -result.value.value
