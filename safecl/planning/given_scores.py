"""Scores of a task's rows that were computed elsewhere, for example by a guard model: a column of the rows, or a file
with a line for each.

A score is a number, or a list of k numbers, each of which is about one k-th of the row's supervised tokens, in order:
token t of n has number floor(k t / n). Columns hold numbers only; in a file, line n is about line n of the task's file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from safecl.config import ConfigError
from safecl.data import TokenDataset
from safecl.data.reading.files import where
from safecl.methods.base import Method
from safecl.methods.terms import Score
from safecl.planning.plans import TaskPlan

MOST_SHOWN = 8


def check_given_scores(methods: list[Method[Any]], tasks: list[TaskPlan]) -> None:
    """Read the scores that the methods take from rows or files. Raises ConfigError as the run does."""
    tasks = [task for task in tasks if task.config.role == "task"]
    for method in methods:
        for score in method.scores():
            if score.of == "given":
                if score.file is not None and len(tasks) > 1:
                    raise ConfigError(
                        f"methods.{method.name}: the file {score.file} is about one task, and there are {len(tasks)}; "
                        f"give the rows of each a column `{score.column}` instead"
                    )
                for task in tasks:
                    given_scores(score, task.dataset)


def given_scores(score: Score, dataset: TokenDataset) -> list[np.ndarray]:
    """Return the score of each supervised token of all rows, fp32 [tokens] each. Raises ConfigError with the places of
    rows without a usable score."""
    found, problems = [], []
    for values, count, place in zip(_raw(score, dataset), dataset.num_targets.tolist(), _places(dataset), strict=True):
        try:
            numbers = _numbers(values, score)
            found.append(numbers[np.arange(count) * len(numbers) // max(count, 1)])
        except ValueError as problem:
            problems.append(f"{place}: {problem}")
    if problems:
        more = [f"and {len(problems) - MOST_SHOWN:,} more rows"] if len(problems) > MOST_SHOWN else []
        raise ConfigError("\n".join([*problems[:MOST_SHOWN], *more]))
    return found


def _places(dataset: TokenDataset) -> Iterator[str]:
    return (where(dataset.path(i), line) for i, line in enumerate(dataset.lines.tolist()))


def _raw(score: Score, dataset: TokenDataset) -> Iterator[Any]:
    """Yield the score of each row as it was given; None where there is none."""
    if score.file is None:
        for i in range(len(dataset)):
            yield dataset.tags(i).get(score.column)
        return
    if len(dataset.paths) > 1:
        raise ConfigError(
            f"{score.file}: scores by line need rows of one file, and these are of {', '.join(sorted(dataset.paths))}; "
            f"give the rows a column `{score.column}` instead"
        )
    lines = _lines_of(score.file)
    for line in dataset.lines.tolist():
        yield _cell(score, lines, line)


def _lines_of(path: str) -> list[str]:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _cell(score: Score, lines: list[str], number: int) -> Any:
    if number > len(lines):
        return None
    try:
        cell = json.loads(lines[number - 1])
    except (ValueError, RecursionError):
        raise ConfigError(f"{score.file}:{number}: is no JSON object") from None
    if not isinstance(cell, dict):
        raise ConfigError(f"{score.file}:{number}: is no JSON object with the key `{score.column}`")
    return cell.get(score.column)


def _numbers(given: Any, score: Score) -> np.ndarray:
    """Return the numbers of one row's score, fp32 [k]. Raises ValueError."""
    column = f"`{score.column}`" if score.file is None else f"`{score.column}` in {score.file}"
    if given is None:
        raise ValueError(f"has no score {column}")
    values = given if isinstance(given, list) else [given]
    low, high = score.bounds
    try:
        numbers = [math.nan if isinstance(value, bool) else float(value) for value in values]
    except (TypeError, ValueError):
        numbers = []
    if not numbers or not all(math.isfinite(value) and low <= value <= high for value in numbers):
        raise ValueError(f"the score {column} is {str(given)[:40]!r}; it must be a number from {low:g} to {high:g}")
    return np.array(numbers, np.float32)
