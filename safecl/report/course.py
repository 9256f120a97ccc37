"""The course of a run for its page: rates over the steps, worst moments, time beyond the gate, what the run did about a
failed gate, what the probe is worth, and how far each layer has moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from safecl.report.folder import Points, ReportedRun

MOST_PLAIN_MOMENTS = 2
"""Moments, the start and the end, that need no drawing."""


@dataclass(frozen=True)
class Acted:
    """An action of the gate: the moment that failed, the limits, and what was done."""

    when: str
    step: int
    failed: list[str]
    done: str


@dataclass(frozen=True)
class Course:
    """rates: points (step, rate) by name, for a drawing. facts: (name, value). layers: by name the distance of the
    saved weights from the start, relative and absolute."""

    rates: dict[str, Points]
    facts: list[tuple[str, str]]
    events: list[Acted]
    layers: list[tuple[str, float, float]]


def course_of(run: ReportedRun) -> Course | None:
    """Return the course of a run; None for an evaluation, and where nothing is known of it."""
    if run.kind == "evaluation":
        return None
    events = [_acted(event) for event in run.results.get("events") or ()]
    moved = run.results.get("weight_drift") or {}
    layers = [(name, moved[name]["relative"], moved[name]["absolute"]) for name in moved]
    found = Course(_rates(run), list(_facts(run.summary)), events, layers)
    return found if found != Course({}, [], [], []) else None


def _rates(run: ReportedRun) -> dict[str, Points]:
    """Return the rates over the steps: generated ones at the moments, the probe's between them."""
    series: dict[str, Points] = {}
    for title, name in {"ASR": "asr", "complied": "complied", "over-refusal": "over_refusal"}.items():
        found = [(e.step, getattr(e.safety, name)) for e in run.evaluations if e.safety is not None]
        points = [(float(step), rate.value) for step, rate in found if rate is not None]
        if len(points) > MOST_PLAIN_MOMENTS:
            series[title] = points
    if run.probed:
        series["probe"] = run.probed
    return series


def _facts(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if (largest := summary.get("max_asr")) is not None:
        yield "largest attack success rate", _number_at(largest, summary.get("max_asr_when"))
    for name, worst in (summary.get("max_asr_of_variants") or {}).items():
        yield f"largest attack success rate, {name}", _number_at(worst["value"], worst["when"])
    for name, worst in (summary.get("min_scores") or {}).items():
        yield f"worst score of {name} since the start", _number_at(worst["value"], worst["when"])
    if beyond := summary.get("beyond_gate"):
        yield "time beyond the gate", _beyond(beyond)
    if probe := summary.get("probe"):
        parts = [f"{title} {_or_dash(probe.get(key))}" for key, title in _WORTH.items()]
        yield "the probe against generated answers", f"{', '.join(parts)}, over {probe.get('moments', 0)} moments"


def _beyond(beyond: Mapping[str, Any]) -> str:
    failed, of, steps = (beyond.get(key, 0) for key in ("moments", "of_moments", "steps"))
    if not failed:
        return f"none of {of} moments failed the gate"
    share = f" ({beyond['share']:.1%})" if beyond["share"] is not None else ""
    return f"{failed} of {of} moments failed the gate; {steps} steps{share} until the next measurements"


_WORTH = {"pearson": "Pearson", "spearman": "Spearman", "auc": "AUC"}


def _number_at(value: float, when: str | None) -> str:
    return f"{value:.3f}" + (f", {when}" if when else "")


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _acted(event: Mapping[str, Any]) -> Acted:
    action = str(event["action"])
    done = {
        "stop": "the run ended",
        "rollback": f"back to step {event.get('back_to', '-')}, learning rate times "
        f"{event.get('learning_rate_factor', '-')}",
        "corrective_replay": f"{event.get('steps', '-')} steps on the memory, the probe "
        + ("recovered" if event.get("recovered") else "did not recover"),
    }.get(action, action)
    if action == "stop" and "back_to" in event:
        done = f"the run ended with the state of step {event['back_to']}"
    return Acted(event["when"], event["step"], list(event.get("failed") or ()), done)
