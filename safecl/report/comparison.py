"""Comparison of several runs, for the table on the terminal and as a page: verdicts, measurements with their
differences to the first run, worst moments, transfer between tasks, cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safecl.config import ConfigError
from safecl.evaluation.results.moment import Evaluation
from safecl.evaluation.results.tables import Row, Value, measures
from safecl.evaluation.statistics.intervals import difference
from safecl.report.answers import answers_at, side_by_side, withheld
from safecl.report.folder import ReportedRun, read_run
from safecl.report.headline import badge_of, limits_of
from safecl.report.page import render, write_page
from safecl.report.record import Facts, sections_of
from safecl.report.run import TRANSFER

_LOWER = "lower is better"


@dataclass(frozen=True)
class Column:
    """One run on the page."""

    title: str
    methods: str
    when: str
    badge: str
    tone: str
    limits: list[str] = field(default_factory=list)
    sections: list[tuple[str, Facts]] = field(default_factory=list)


@dataclass(frozen=True)
class Change:
    """A difference to the first run. clear: its interval does not contain 0. tone: good or bad where it is clear."""

    value: float
    low: float
    high: float
    clear: bool
    tone: str


@dataclass(frozen=True)
class ComparedRow:
    """One measure over all runs; `changes` has None for the first run and where something was not measured."""

    title: str
    higher_is_better: bool
    values: list[Value]
    changes: list[Change | None]


@dataclass(frozen=True)
class CourseRow:
    """A number over the course of a run, a value per run; note: how to read it."""

    title: str
    note: str
    values: list[float | None]


def read_runs(folders: Sequence[str | Path]) -> list[ReportedRun]:
    """Read the runs. Raises ConfigError that names every folder without a run or without any measurement."""
    runs, problems = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except ConfigError as error:
            problems.append(str(error))
    problems += [f"{run.folder}: nothing was measured in this run" for run in runs if not run.evaluations]
    if problems:
        raise ConfigError("\n".join(problems))
    return runs


def named(runs: Sequence[ReportedRun]) -> list[str]:
    """Return the folders' names, or the whole paths of folders that have the same name."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else str(run.folder) for name, run in zip(names, runs, strict=True)]


def last_moments(runs: Sequence[ReportedRun]) -> list[Evaluation]:
    return [run.evaluations[-1] for run in runs]


def warnings_of(runs: Sequence[ReportedRun]) -> list[str]:
    """List the differences that make the numbers of these runs hard to compare."""
    sizes = {(safety.scorer, safety.asr.n) for run in runs if (safety := run.evaluations[-1].safety) is not None}
    prompts = {_prompt_hashes(run) for run in runs} - {()}
    steps = {run.results["steps"] for run in runs if run.kind == "finished"}
    found = []
    if len(sizes) > 1:
        found.append("Safety was measured with other scorers or other numbers of prompts.")
    elif len(prompts) > 1:
        found.append("Safety was measured with other prompts.")
    if len(steps) > 1:
        found.append("The runs made different numbers of steps.")
    return found + [f"{run.name} is not finished." for run in runs if run.kind == "unfinished"]


def _prompt_hashes(run: ReportedRun) -> tuple[str, ...]:
    measured_with = (run.results["provenance"] or {}).get("measured_with") or {}
    return tuple(prompts["sha256"] for prompts in measured_with.get("prompts") or ())


def comparison_page(runs: Sequence[ReportedRun]) -> str:
    """Return the page as HTML."""
    titles = named(runs)
    answers = [answers_at(run, run.evaluations[-1]) for run in runs]
    return render(
        "comparison.html",
        runs=runs,
        columns=[_column(run, title) for run, title in zip(runs, titles, strict=True)],
        rows=[compared(row) for row in measures(last_moments(runs))],
        course=_course(runs),
        prompts=side_by_side(answers) if all(answers) else None,
        withheld=[run.name for run in runs if withheld(run)],
        warnings=warnings_of(runs),
        version=runs[0].results.get("safecl", ""),
    )


def _column(run: ReportedRun, title: str) -> Column:
    badge, tone = badge_of(run)
    return Column(title, run.methods_text, run.evaluations[-1].when, badge, tone, limits_of(run), sections_of(run))


def compared(row: Row) -> ComparedRow:
    """Add the differences to the first run to a row of measures."""
    title, higher_is_better, values = row
    first = values[0]
    return ComparedRow(
        title,
        higher_is_better,
        values,
        [None, *(_change(value, first, higher_is_better) for value in values[1:])],
    )


def _change(value: Value, first: Value, higher_is_better: bool) -> Change | None:
    if value is None or first is None or not (math.isfinite(value.value) and math.isfinite(first.value)):
        return None
    by, low, high = difference(value, first)
    clear = low > 0 or high < 0
    tone = ("good" if (by > 0) == higher_is_better else "bad") if clear else ""
    return Change(by, low, high, clear, tone)


def _course(runs: Sequence[ReportedRun]) -> list[CourseRow]:
    """Return the worst moments of the runs, and the averages over sequences of tasks, a row each with a value per
    run."""
    beyond = [(run.summary.get("beyond_gate") or {}).get("share") for run in runs]
    course = [
        CourseRow("largest attack success rate", _LOWER, [run.summary.get("max_asr") for run in runs]),
        CourseRow("share of steps beyond the gate", _LOWER, beyond),
    ]
    rows = [row for row in course if any(value is not None for value in row.values)]
    for key, (title, note) in TRANSFER.items():
        values = [run.summary.get(key) if len(run.summary.get("tasks") or ()) > 1 else None for run in runs]
        if any(value is not None for value in values):
            rows.append(CourseRow(title, note, values))
    return rows


def write_comparison(runs: Sequence[ReportedRun], path: Path) -> Path:
    """Write the page and return its path. Raises ConfigError as `write_page` does."""
    return write_page(path, comparison_page(runs))
