"""The top of a page, for a customer: a badge with limits and intervals, and a sentence each on safety, on the task, and
on what was left out of the upload. The sentences say no more than the numbers support."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safecl.config.gate import variant_of
from safecl.evaluation.results.moment import Evaluation
from safecl.evaluation.results.safety import SafetyResult
from safecl.evaluation.results.task import TaskResult
from safecl.evaluation.statistics.intervals import Mean, Rate
from safecl.report.folder import ReportedRun
from safecl.report.skipped import skipped_sentence

RATES = {
    "asr": "Disallowed requests that are not refused",
    "asr_on_task": "Disallowed requests that are answered on the matter",
    "affirmative": "Disallowed requests whose answer begins to agree",
    "complied": "Disallowed requests whose answer begins to comply",
    "off_task": "Disallowed requests with an off-task answer",
    "over_refusal": "Harmless requests that are refused",
    "benign_off_task": "Harmless requests with an off-task answer",
    "truncated": "Answers that are cut off",
}
"""Rates in a customer's words."""
JUDGED = "Disallowed requests with a harmful answer"
"""The attack success rate by a judge."""
_RATE_OF = {"max_asr": "asr", "max_over_refusal": "over_refusal"}
MOST_LIMITS = 4
_BADGES = {"passed": ("PASSED", "good"), "failed": ("FAILED", "bad"), "undecided": ("UNDECIDED", "open")}
LOST = "Refusals were lost"
KEPT = "No loss of refusals is seen: the intervals overlap"
HARMFUL = "More requests get a harmful answer"
HARMLESS = "No more harm is seen: the intervals overlap"
MOST_TASKS = 3


@dataclass(frozen=True)
class Headline:
    """badge and tone (good, bad, open, none); limits: one line each; the three sentences; warnings about the scores."""

    badge: str
    tone: str
    limits: list[str]
    safety: str
    task: str
    left_out: str
    warnings: list[str]


def headline_of(run: ReportedRun) -> Headline:
    """Return the top of the run's page."""
    badge, tone = badge_of(run)
    return Headline(
        badge,
        tone,
        limits_of(run),
        _safety(run),
        _task(run.evaluations, run.summary),
        _left_out(run),
        _warnings(run),
    )


def badge_of(run: ReportedRun) -> tuple[str, str]:
    """Return the badge and its tone."""
    if run.kind == "unfinished":
        return "UNFINISHED", "open"
    gate = run.results["gate"]
    return _BADGES[gate["verdict"]] if gate else ("NOT JUDGED", "none")


def limits_of(run: ReportedRun) -> list[str]:
    """Return a line per limit with the measured rate and its interval, or why there is none."""
    if run.kind == "unfinished":
        status = run.status
        assert status is not None, "an unfinished run is read with its status"
        return [f"{dict(status.facts)['progress'].capitalize()}. A verdict is given at the end of a run."]
    gate = run.results["gate"]
    if not gate:
        return ["No limit was set, so there is no verdict."]
    checks = sorted(gate["checks"], key=lambda check: check["verdict"] == "passed")
    scorer = scorer_of(run)
    if len(checks) == 1:
        return [limit_line(checks[0], scorer)]
    lines = [f"{limit_line(check, scorer)}: {check['verdict']}" for check in checks[:MOST_LIMITS]]
    if rest := checks[MOST_LIMITS:]:
        passed = sum(check["verdict"] == "passed" for check in rest)
        lines.append(f"and {len(rest)} more limits, {'all' if passed == len(rest) else passed} of them passed")
    return lines


def scorer_of(run: ReportedRun) -> str:
    """Return the scorer behind the headline rate of the last measurement; empty without one."""
    return next((each.safety.scorer for each in reversed(run.evaluations) if each.safety is not None), "")


def limit_line(check: Mapping[str, Any], scorer: str = "") -> str:
    """Describe one check of the gate. scorer: behind the headline rate."""
    limit = f"limit {100 * check['limit']:.3g}%"
    measured = check["measured"]
    if measured is None:
        return f"{limit_title(check, scorer)}: not measured, {limit}"
    sign = "+" if is_rise(check) else ""
    return (
        f"{limit_title(check, scorer)}: {_share(measured['value'], measured['low'], measured['high'], sign)}, {limit}"
    )


def limit_title(check: Mapping[str, Any], scorer: str = "") -> str:
    """Return a limit's name in a customer's words. scorer: behind the headline rate."""
    variant, rate = variant_of(check.get("rate") or _RATE_OF.get(check["name"], "asr"))
    title = JUDGED if rate == "asr" and finds_harm(scorer) else RATES.get(rate)
    if title is None:
        title = f"{JUDGED if finds_harm(rate) else RATES['asr']}, by {rate}"
    if is_rise(check):
        title = f"{title}, rise over the aligned model"
    return ", ".join(part for part in (title, variant, check.get("category")) if part)


def finds_harm(scorer: str) -> bool:
    """Say whether a scorer judges harm; one by keywords finds refusals."""
    return bool(scorer) and not scorer.startswith(("keyword:", "prefix:"))


def is_rise(check: Mapping[str, Any]) -> bool:
    """Say whether the limit is on the rise over the aligned model."""
    return str(check["name"]).endswith("max_rise")


def _share(value: float | None, low: float, high: float, sign: str = "") -> str:
    shown = f"{value:{sign}.1%}" if value is not None and math.isfinite(value) else "unknown"
    return f"{shown} ({low:{sign}.1%} to {high:{sign}.1%})"


# -------------------------------------------------------------------------------------------------------------- safety


def _safety(run: ReportedRun) -> str:
    """Compare refusals at the last moment at which they were measured with those at the first."""
    safe = [(evaluation, evaluation.safety) for evaluation in run.evaluations if evaluation.safety is not None]
    if not safe:
        return "Safety was not measured: no safety prompts were named, so nothing is said about it here."
    (start, before), (end, after) = safe[0], safe[-1]
    judged = finds_harm(after.scorer)
    happened = "get no harmful answer" if judged else "are refused"
    now = f"{_refused(after.asr)} of {after.asr.n} disallowed requests {happened}"
    if start is end or run.kind == "evaluation":
        return f"{now[0].upper()}{now[1:]}{_over_refusal(after)}."
    then = f"{_at(start).lower()} {_percent(_complement(before.asr))}"
    lost, kept = (HARMFUL, HARMLESS) if judged else (LOST, KEPT)
    state = f"{lost}: the intervals do not overlap" if after.asr.low > before.asr.high else kept
    return f"{state}. {_at(end)} {now}, {then}{_over_refusal(after)}."


def _refused(asr: Rate) -> str:
    value = f"{1 - asr.value:.1%}" if math.isfinite(asr.value) else "an unknown share"
    return f"{value} ({1 - asr.high:.1%} to {1 - asr.low:.1%})"


def _over_refusal(after: SafetyResult) -> str:
    rate = after.over_refusal
    return f"; of {rate.n} harmless ones {_share(rate.value, rate.low, rate.high)}" if rate is not None else ""


def _complement(rate: Rate) -> float:
    return 1 - rate.value


def _percent(value: float) -> str:
    return f"{value:.1%}" if math.isfinite(value) else "an unknown share"


def _at(evaluation: Evaluation) -> str:
    return "Before training" if evaluation.step == 0 else evaluation.when.capitalize()


# ---------------------------------------------------------------------------------------------------------------- task


def _task(evaluations: Sequence[Evaluation], summary: Mapping[str, Any]) -> str:
    """Describe each task's own metric at the end, just after the task and at the start; of many tasks the averages."""
    names = list(dict.fromkeys(name for evaluation in evaluations for name in evaluation.tasks))
    if not names:
        return "The task was not measured: no held-out rows were named."
    if len(names) > MOST_TASKS and summary.get("average") is not None:
        return f"{len(names)} tasks: {_over_the_sequence(summary)}."
    parts = [_one_task(name, [each for each in evaluations if name in each.tasks]) for name in names]
    if len(names) > 1 and (averages := _over_the_sequence(summary)):
        parts.append(averages)
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _one_task(name: str, taken: Sequence[Evaluation]) -> str:
    first, last = taken[0].tasks[name], taken[-1].tasks[name]
    text = f"{name}: {last.metric.replace('_', ' ')} {last.value.value:.3f} ({_ends(last.value)})"
    if last.metric.endswith("nll"):
        text += ", lower is better"
    own = [each.tasks[name] for each in taken[:-1] if each.when == f"after {name}"]
    text += "".join(f", just after this task {result.value.value:.3f}" for result in own)
    return text if len(taken) == 1 else f"{text}, {_at(taken[0]).lower()} {_value(first)}"


def _ends(value: Rate | Mean) -> str:
    return f"{value.low:.3f} to {value.high:.3f}"


def _value(result: TaskResult) -> str:
    return f"{result.value.value:.3f}"


def _over_the_sequence(summary: Mapping[str, Any]) -> str:
    average, transfer, forgetting = (summary.get(key) for key in ("average", "backward_transfer", "forgetting"))
    if average is None or transfer is None or forgetting is None:
        return ""
    return (
        f"over the sequence of tasks average score {average:.3f}, backward transfer {transfer:+.3f}, "
        f"forgetting {forgetting:.3f}"
    )


# ------------------------------------------------------------------------------------------------------------ left out


def _left_out(run: ReportedRun) -> str:
    """Say how many rows of the uploads were not trained on, and why."""
    if run.kind == "evaluation":
        return "Nothing was trained here: the model was measured as it is."
    data = (run.results["provenance"] or {}).get("data")
    if data is None:
        return _left_out_by_scan(run)
    uploads = [task for task in data if task["role"] != "align"]
    total = sum(task["rows_in_file"] for task in uploads)
    reasons = _reasons(uploads)
    screened = "" if run.results["provenance"].get("screened") else " The upload was not screened."
    mixed = sum(task["poisoned"] for task in uploads)
    poison = f" {mixed:,} harmful rows were mixed in on purpose." if mixed else ""
    if not any(reasons.values()):
        return f"Nothing was left out of the upload of {total:,} rows.{screened}{poison}"
    why = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)
    return f"{sum(reasons.values()):,} of {total:,} uploaded rows were left out: {why}.{screened}{poison}"


def _reasons(uploads: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    flagged = sum(
        task["flagged"]["rows"] for task in uploads if task["flagged"] is not None and task["flagged"]["weight"] == 0.0
    )
    bad, repeated = (sum(task[key] for task in uploads) for key in ("bad", "repeated"))
    used = sum(task["rows"] - task["poisoned"] for task in uploads)
    rest = sum(task["rows_in_file"] for task in uploads) - used - flagged - bad - repeated
    return {
        "flagged by the screen": flagged,
        "that cannot be used": bad,
        "that repeat safety prompts": repeated,
        "beyond max_rows": max(0, rest),
    }


def _left_out_by_scan(run: ReportedRun) -> str:
    if run.scans:
        return f"Screen of the upload: {' '.join(run.scans)}"
    if run.kind == "unfinished":
        return "What is left out of the upload is said at the end of a run."
    return "What was left out of the upload is not recorded in this run."


def _warnings(run: ReportedRun) -> list[str]:
    found = []
    if run.evaluations:
        last = run.evaluations[-1]
        found = [f"Warning, {last.when}: {text}." for text in last.warnings]
        if last.safety is not None and (cut_off := last.safety.cut_off) is not None:
            found.append(
                f"{_at(last)} {cut_off.hits} of {cut_off.n} prompts have no answer, because the thought does not end; "
                "they count neither as refused nor as answered."
            )
    counts = (run.results.get(key, 0) for key in ("steps", "skipped_steps", "skipped_at_the_end"))
    return found + ([skipped] if (skipped := skipped_sentence(*counts)) is not None else [])
