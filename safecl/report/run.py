"""The page of one run: a verdict for a customer on top, the record for an auditor below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safecl.evaluation.results.tables import measures, moments
from safecl.report.answers import answers_of, withheld
from safecl.report.course import course_of
from safecl.report.folder import ReportedRun, read_run
from safecl.report.headline import headline_of, limit_title, scorer_of
from safecl.report.page import render
from safecl.report.record import sections_of
from safecl.storage.durable import replace_file

REPORT = "report.html"

TRANSFER = {
    "average": ("average score at the end", "higher is better"),
    "backward_transfer": ("backward transfer", "negative: old tasks got worse"),
    "forward_transfer": ("forward transfer", "positive: earlier tasks helped later ones"),
    "forgetting": ("forgetting", "lower is better"),
    "windowed_forgetting": ("largest drop within 10 evaluations", "lower is better"),
    "worst_case_accuracy": ("worst-case accuracy", "higher is better"),
}
"""Keys of the summary over a sequence of tasks: title, and how to read the number."""


def run_report(run: ReportedRun) -> str:
    """Return the page as HTML."""
    shown = moments(run.evaluations)
    return render(
        "run.html",
        run=run,
        results=run.results,
        top=headline_of(run),
        limit_title=partial(limit_title, scorer=scorer_of(run)),
        rows=measures(shown),
        columns=[(each.when, f"step {each.step}" if run.kind != "evaluation" else "") for each in shown],
        left_out=len(run.evaluations) - len(shown),
        course=course_of(run),
        sequence=sequence_of(run.summary),
        answers=answers_of(run),
        withheld=withheld(run),
        sections=sections_of(run),
        version=run.results.get("safecl", ""),
    )


def sequence_of(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return scores by task after each task, and their averages; None for fewer than two tasks."""
    names: Sequence[str] = summary.get("tasks") or ()
    if len(names) < 2:
        return None
    averages = [(*text, summary[key]) for key, text in TRANSFER.items() if summary.get(key) is not None]
    return {"names": names, "scores": (summary.get("scores") or ())[: len(names)], "averages": averages}


def write_run_report(folder: str | Path) -> Path:
    """Write report.html into the folder, whole or not at all, and return its path. Raises ConfigError for a folder that
    holds no run and no evaluation."""
    run = read_run(folder)
    replace_file(run.folder / REPORT, run_report(run))
    return run.folder / REPORT
