"""The numbers of one finished run, read from its folder: rates with the outcome of each prompt, scores, and cost."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safecl.config import ConfigError
from safecl.evaluation.gates.folders import RESULTS, VARIANT_RATES, with_judges
from safecl.evaluation.gates.outcomes import Scorers, outcome_of, outputs_file, read_records, records_of
from safecl.evaluation.judges.kept import later_verdicts, with_later_verdicts
from safecl.evaluation.records import file_name
from safecl.evaluation.results.moment import Evaluation
from safecl.evaluation.results.restore import evaluations_of
from safecl.evaluation.results.safety import SafetyResult
from safecl.evaluation.statistics.intervals import Rate
from safecl.storage.course_records import Summary
from safecl.storage.records import read_lines, read_record
from safecl.storage.run_records import Cost, Results, TaskRow

SAFETY = ("asr", "asr_on_task", "affirmative", "complied", "off_task", "over_refusal")
"""The rates of safety in a table, of the last measurement."""
ACCURACY = "accuracy"
"""Mean over the tasks of their last scores, for tasks where higher is better."""
PLAIN_STATE = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class RunNumbers:
    """The values that a run has measured, and what it has cost."""

    folder: Path
    values: dict[str, float]
    """By measure: rates, scores of tasks, worst moments, transfer, and cost."""
    outcomes: dict[str, dict[Hashable, bool | None]] = field(default_factory=dict, repr=False)
    """By measure, of each prompt or row; only for measures that are rates and whose records were kept."""
    verdict: str | None = None
    """The gate's; None without one."""
    learned: tuple[float | None, ...] = ()
    """The score of each task right after it was trained, in their order; the negative where lower is better."""
    further: tuple[str, ...] = ()
    """Measures that CSV and JSON have and a table for people leaves out: rates by other scorers, and of variants."""


def read_numbers(folder: Path) -> RunNumbers:
    """Read a finished run. Raises ConfigError where it has not finished."""
    results = read_record(folder / RESULTS, Results)
    if results is None:
        raise ConfigError(f"{folder}: holds no {RESULTS}, so it has not finished")
    evaluations = evaluations_of(results["evaluations"], folder / RESULTS)
    summary = results.get("summary") or Summary()
    values = _cost(results) | _summary(summary)
    outcomes: dict[str, dict[Hashable, bool | None]] = {}
    further: tuple[str, ...] = ()
    if evaluations:
        last = evaluations[-1]
        safety = _with_records(folder, last)
        rates = _rates(safety) if safety is not None else {}
        further = tuple(name for name in rates if name not in SAFETY)
        values |= {name: rate.value for name, rate in rates.items()} | _scores(last)
        outcomes = (_safety_outcomes(safety, rates) if safety is not None else {}) | _task_outcomes(folder, last)
    gate = results.get("gate")
    known = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
    return RunNumbers(folder, known, outcomes, gate["verdict"] if gate else None, _learned(summary), further)


def _with_records(folder: Path, last: Evaluation) -> SafetyResult | None:
    """Return the safety of a moment with its records, as far as they were kept, and the rates of judges that were asked
    later."""
    path = outputs_file(folder / "outputs", last.when, last.step)
    if last.safety is None or not path.is_file():
        return last.safety
    verdicts = later_verdicts(folder, path.name)
    records = with_later_verdicts(read_records(path), verdicts)
    return with_judges(replace(last.safety, outputs=records), list(verdicts))


def _rates(safety: SafetyResult) -> dict[str, Rate]:
    """Return the rates by name: those of SAFETY, the attack success rate by the other scorers, those of variants."""
    found = {name: rate for name in SAFETY if (rate := getattr(safety, name)) is not None}
    found |= {name: rate for name, rate in safety.asr_by_scorer.items() if name != safety.scorer}
    for variant, of in safety.variants.items():
        found |= {f"{variant}/{name}": rate for name in VARIANT_RATES if (rate := getattr(of, name)) is not None}
    return found


def _scores(last: Evaluation) -> dict[str, float]:
    scores = {name: result.value.value for name, result in last.tasks.items()}
    upward = [result.value.value for result in last.tasks.values() if result.higher_is_better]
    kl = {"kl_to_aligned": last.kl_to_aligned.value} if last.kl_to_aligned is not None else {}
    return scores | ({ACCURACY: math.fsum(upward) / len(upward)} if upward else {}) | kl


def _safety_outcomes(safety: SafetyResult, rates: Iterable[str]) -> dict[str, dict[Hashable, bool | None]]:
    found: dict[str, dict[Hashable, bool | None]] = {}
    for name in rates if safety.outputs else ():
        outcome = outcome_of(name, Scorers(safety.scorer, safety.over_refusal_scorer))
        found[name] = {record["id"]: outcome(record) for record in records_of(safety.outputs, name)}
    return found


def _task_outcomes(folder: Path, last: Evaluation) -> dict[str, dict[Hashable, bool | None]]:
    """Return the outcomes of tasks whose score is a rate, and those of `accuracy` over all such tasks."""
    found: dict[str, dict[Hashable, bool | None]] = {}
    for name, result in last.tasks.items():
        path = folder / "outputs" / f"{last.step:06d}-{file_name(last.when)}-{file_name(name)}.jsonl"
        if not result.higher_is_better or not path.is_file():
            continue
        correct = [record.get("correct") for record in read_lines(path, TaskRow)]
        if None not in correct:
            found[name] = {i: bool(hit) for i, hit in enumerate(correct)}
    sizes = {len(outcomes) for outcomes in found.values()}
    if len(sizes) == 1 and len(found) == sum(result.higher_is_better for result in last.tasks.values()):
        # with as many rows in each task the mean over rows is the mean over tasks
        found[ACCURACY] = {(name, row): hit for name, outcomes in found.items() for row, hit in outcomes.items()}
    return found


def _summary(summary: Summary) -> dict[str, Any]:
    names = (
        "max_asr",
        "average",
        "backward_transfer",
        "forward_transfer",
        "forgetting",
        "windowed_forgetting",
        "worst_case_accuracy",
    )
    beyond = summary.get("beyond_gate")
    return {name: summary.get(name) for name in names} | {"beyond_gate": beyond["share"] if beyond else None}


def _learned(summary: Summary) -> tuple[float | None, ...]:
    """Return the score of each task right after it was trained."""
    return tuple(row[j] for j, row in enumerate(summary.get("scores") or ()) if j < len(row))


def _cost(results: Results) -> dict[str, Any]:
    """Return seconds, tokens, seconds per step, and bytes: state besides weights and moments, memory, recorded
    outputs."""
    cost = results.get("cost") or Cost(seconds_per_step=None, state_bytes={}, memory_bytes=0, recorded_bytes=0)
    state = sum(size for kind, size in cost["state_bytes"].items() if kind not in PLAIN_STATE)
    kept = state + cost["memory_bytes"] + cost["recorded_bytes"]
    return {
        "seconds": results.get("seconds"),
        "seconds_per_step": cost["seconds_per_step"],
        "tokens": results.get("tokens"),
        "bytes": kept,
        "steps": results.get("steps"),
    }
