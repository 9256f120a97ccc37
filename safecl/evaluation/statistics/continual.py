"""Continual-learning metrics over a matrix of scores, and over the whole course of training.

R[i][j] is the score on task j after training on tasks 0..i (T tasks; higher is better). None or NaN marks a score that
was not measured. It never enters a mean or a maximum: as a zero it would win the maximum of negative scores.

    average     mean over j of R[T-1][j]
    BWT         mean over j < T-1 of R[T-1][j] - R[j][j]      negative: forgetting     Lopez-Paz and Ranzato 2017
    FWT         mean over j > 0 of R[j-1][j] - b[j]           b: the untrained model   Lopez-Paz and Ranzato 2017
    forgetting  mean over j < T-1 of max_{i < T-1} R[i][j] - R[T-1][j]
                                                              positive: forgetting     Chaudhry et al. 2018
    intransigence  mean over j of a[j] - R[j][j]              a: a reference that learns j freely       ibid.

Over the course (De Lange et al. 2023, arXiv 2205.13452), with A_n(j) the score on task j at the n-th evaluation:

    min-ACC(j) = min over evaluations after task j was finished of A_n(j);   min-ACC = mean over old tasks
    WC-ACC     = A(current task) / T + (1 - 1/T) min-ACC                     worst case, the current task counted once
    WF^D(j)    = largest drop A_n(j) - A_m(j), n < m, within D consecutive evaluations

For safety the worst case is the largest attack success rate seen, not the last: `max_over_training`.
Where lower scores are better (attack success rate, nll), pass their negative or 1 - rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

Score = float | None


def _known(value: Score) -> TypeGuard[float]:
    return value is not None and not math.isnan(value)


def _mean(values: Sequence[Score]) -> Score:
    known = [value for value in values if _known(value)]
    return math.fsum(known) / len(known) if known else None


def _minus(a: Score, b: Score) -> Score:
    return a - b if _known(a) and _known(b) else None


def _check(matrix: Sequence[Sequence[Score]]) -> int:
    size = len(matrix)
    if size == 0 or any(len(row) != size for row in matrix):
        lengths = [len(row) for row in matrix]
        raise ValueError(f"the matrix of scores must be square, one row and column per task; its rows have {lengths}")
    return size


def average_score(matrix: Sequence[Sequence[Score]]) -> Score:
    """Mean score over all tasks at the end; None where nothing was measured."""
    return _mean(matrix[_check(matrix) - 1])


def backward_transfer(matrix: Sequence[Sequence[Score]]) -> Score:
    """Backward transfer (BWT); negative where old tasks got worse. None for a single task."""
    last = _check(matrix) - 1
    return _mean([_minus(matrix[last][j], matrix[j][j]) for j in range(last)])


def forward_transfer(matrix: Sequence[Sequence[Score]], untrained: Sequence[Score]) -> Score:
    """Forward transfer (FWT) against `untrained`, the start model's score per task. None for a single task."""
    size = _check(matrix)
    if len(untrained) != size:
        raise ValueError(f"untrained has {len(untrained)} scores for {size} tasks")
    return _mean([_minus(matrix[j - 1][j], untrained[j]) for j in range(1, size)])


def forgetting(matrix: Sequence[Sequence[Score]]) -> Score:
    """Mean drop from a task's best score before the last task; positive where tasks were forgotten. None for a single
    task."""
    last = _check(matrix) - 1
    drops = []
    for j in range(last):
        earlier = [score for i in range(last) if _known(score := matrix[i][j])]
        drops.append(_minus(max(earlier), matrix[last][j]) if earlier else None)
    return _mean(drops)


def intransigence(matrix: Sequence[Sequence[Score]], reference: Sequence[Score]) -> Score:
    """Mean by which tasks are learnt worse than by a reference that learns each freely; negative where they are learnt
    better. None where nothing was measured."""
    size = _check(matrix)
    if len(reference) != size:
        raise ValueError(f"the reference has {len(reference)} scores for {size} tasks")
    return _mean([_minus(reference[j], matrix[j][j]) for j in range(size)])


def max_over_training(values: Sequence[Score]) -> Score:
    """Largest value of a rate over all evaluations of a run (the worst attack success rate). None where there is
    none."""
    return max((value for value in values if _known(value)), default=None)


def min_accuracy(course: Sequence[Sequence[Score]], finished_at: Sequence[int | None]) -> list[Score]:
    """min-ACC of each task.

    Args: `course[n][j]`: score on task j at evaluation n; `finished_at[j]`: the evaluation right after task j was
    finished, None where it never was.
    Returns: the smallest score after that evaluation, per task; None where there is none.
    """
    lowest: list[Score] = []
    for j, start in enumerate(finished_at):
        later = [] if start is None else [score for row in course[start + 1 :] if _known(score := row[j])]
        lowest.append(min(later, default=None))
    return lowest


def worst_case_accuracy(course: Sequence[Sequence[Score]], finished_at: Sequence[int | None], current: int) -> Score:
    """WC-ACC at the end of `course`: task `current`, which is or was just trained, counts with its score, each older
    task with its lowest."""
    lowest = min_accuracy(course, finished_at)
    return _mean([course[-1][current], *(value for j, value in enumerate(lowest) if j != current)])


def windowed_forgetting(scores: Sequence[Score], window: int) -> Score:
    """WF^D of one task: the largest drop between two of `window` consecutive evaluations; 0 where the score only
    rises."""
    if window < 2:
        raise ValueError(f"window={window}: a drop needs at least two evaluations")
    known = [value for value in scores if _known(value)]
    drops = [max(known[max(0, m - window + 1) : m + 1]) - known[m] for m in range(len(known))]
    return max(drops, default=None)
