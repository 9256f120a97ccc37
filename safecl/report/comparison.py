"""Comparison of several finished runs, for the table on the terminal and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safecl.config import ConfigError
from safecl.evaluation.measure import Evaluation
from safecl.evaluation.tables import measures
from safecl.report.page import render
from safecl.report.run import ReportedRun, read_run, side_by_side
from safecl.storage.durable import replace_file

GENERATOR = '<meta name="generator" content="safecl">'


def read_runs(folders: Sequence[str | Path]) -> list[ReportedRun]:
    """Read the runs. Raises ConfigError that names every folder without a finished run or without any measurement."""
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
    steps = {run.results["steps"] for run in runs}
    found = ["Safety was measured with other scorers or other numbers of prompts."] if len(sizes) > 1 else []
    return found + (["The runs made different numbers of steps."] if len(steps) > 1 else [])


def comparison_page(runs: Sequence[ReportedRun]) -> str:
    """Return the page as HTML."""
    titles, withheld = named(runs), [run.name for run in runs if run.withheld]
    answers = [run.answers(run.evaluations[-1]) for run in runs]
    return render(
        "comparison.html", runs=runs, rows=measures(last_moments(runs)),
        columns=[(title, run.methods_text) for title, run in zip(titles, runs, strict=True)], titles=titles,
        prompts=side_by_side(answers) if all(answers) else None, withheld=withheld, warnings=warnings_of(runs),
        version=runs[0].results["safecl"],
    )  # fmt: skip


def write_comparison(runs: Sequence[ReportedRun], path: Path) -> Path:
    """Write the page, whole or not at all. Raises ConfigError where the file exists and is not a page of safecl."""
    if path.is_dir():
        path = path / "report.html"
    if path.exists() and GENERATOR not in path.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise ConfigError(
            f"{path}: exists already and was not made by `safecl report`; choose another file with --output"
        )
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: no such folder {path.absolute().parent}")
    replace_file(path, comparison_page(runs))
    return path
