"""The table of a sweep: a row per cell, with mean, spread and pooled interval of each measure, paired tests against a
baseline, and what each cell costs beside it.

Tests are exact sign-flip tests over prompts, summed over the seeds that both cells have (statistics/pooled.py), for the
attack success rate, over-refusal, every task, and with several tasks of as many rows the accuracy; Holm's correction is
over all tests of the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from safecl.evaluation.statistics.continual import intransigence
from safecl.evaluation.statistics.paired import holm
from safecl.evaluation.statistics.pooled import Spread, paired_p_value, pooled_interval, spread
from safecl.sweeping.collecting import ACCURACY, SAFETY, RunNumbers
from safecl.sweeping.pareto import Standing, standings

BUDGET = ("seconds_per_step", "tokens", "seconds", "bytes")
"""What cells cost; the first three are also given as multiples of the baseline's."""
HIDDEN_TESTS = ("asr_on_task", "affirmative", "complied", "off_task")
"""Rates that explain the attack success rate, and are not tested by themselves."""

LOWER_IS_BETTER = (
    "asr",
    "over_refusal",
    "max_asr",
    "off_task",
    "affirmative",
    "complied",
    "forgetting",
    "windowed_forgetting",
    "intransigence",
    "beyond_gate",
    "kl_to_aligned",
)


@dataclass
class Cell:
    """One row: a setting, over its runs."""

    name: str
    overrides: tuple[str, ...]
    """The cell's settings, without the seed."""
    runs: dict[str, RunNumbers]
    """By seed."""
    measures: dict[str, Spread] = field(default_factory=dict)
    p_values: dict[str, float] = field(default_factory=dict)
    """Against the baseline, by measure, after Holm's correction."""
    budget: dict[str, float] = field(default_factory=dict)
    """Multiples of the baseline's mean cost."""
    standing: Standing | None = None
    """Place in the trade of safety against accuracy; None where one of both was not measured."""

    @property
    def verdicts(self) -> dict[str, int]:
        """Number of runs by the gate's verdict; empty without a gate."""
        found = [run.verdict for run in self.runs.values() if run.verdict is not None]
        return {verdict: found.count(verdict) for verdict in dict.fromkeys(found)}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "cell": self.name,
            "overrides": list(self.overrides),
            "runs": {seed: str(run.folder) for seed, run in self.runs.items()},
            "measures": {name: found.to_dict() for name, found in self.measures.items()},
            "p_holm": self.p_values,
            "times_baseline": self.budget,
            "pareto": self.standing,
            "gate": self.verdicts,
        }


@dataclass(frozen=True)
class SweepTable:
    """All cells, in the sweep's order."""

    cells: tuple[Cell, ...]
    baseline: str
    unfinished: tuple[str, ...] = ()
    """Names of the runs that have no results."""
    missing_baseline: str | None = None
    """The cell that was to be the baseline and has no results, so that another one took its place."""

    @property
    def measures(self) -> list[str]:
        """All measures that any cell has, in the order of the columns."""
        found = list(dict.fromkeys(name for cell in self.cells for name in cell.measures))
        first = [*SAFETY, "max_asr", ACCURACY]
        return sorted(found, key=lambda name: first.index(name) if name in first else len(first))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        cells = [cell.to_dict() for cell in self.cells]
        found = {"schema": 1, "baseline": self.baseline, "cells": cells, "unfinished": list(self.unfinished)}
        return found | ({"missing_baseline": self.missing_baseline} if self.missing_baseline is not None else {})


def shown_measures(table: SweepTable) -> list[str]:
    """Return the measures that a table for people shows: rates, worst case, tasks, transfer where there is any."""
    without = [*HIDDEN_TESTS, *BUDGET, "steps", *(name for cell in table.cells for name in further_of(cell))]
    if "forgetting" not in table.measures:  # of a single task they say what its accuracy says
        without += ["average", "windowed_forgetting", "worst_case_accuracy", "intransigence"]
    return [name for name in table.measures if name not in without]


def further_of(cell: Cell) -> set[str]:
    """Return the measures of a cell that only CSV and JSON have."""
    return {name for run in cell.runs.values() for name in run.further}


def make_table(
    cells: Sequence[Cell], baseline: str, unfinished: Sequence[str] = (), *, wanted: str | None = None
) -> SweepTable:
    """Fill in the cells' statistics. baseline: the name of one of them; wanted: that of the baseline that was asked
    for."""
    for cell in cells:
        cell.measures = _spreads(list(cell.runs.values()))
    reference = next(cell for cell in cells if cell.name == baseline)
    for cell in cells:
        if (found := _intransigence(cell, reference)) is not None:
            cell.measures["intransigence"] = found
    _test(cells, reference)
    for cell in cells:
        cell.budget = _times(cell, reference)
    for cell, standing in zip(cells, standings([_trade(cell) for cell in cells]), strict=True):
        cell.standing = standing
    return SweepTable(tuple(cells), baseline, tuple(unfinished), wanted if wanted != baseline else None)


def _spreads(runs: Sequence[RunNumbers]) -> dict[str, Spread]:
    found = {}
    for name in dict.fromkeys(name for run in runs for name in run.values):
        outcomes = [run.outcomes[name] for run in runs if run.outcomes.get(name)]
        interval = pooled_interval(outcomes) if outcomes else None
        if (over_runs := spread([run.values[name] for run in runs if name in run.values], interval)) is not None:
            found[name] = over_runs
    return found


def _intransigence(cell: Cell, reference: Cell) -> Spread | None:
    """Return by how much a cell's runs learn their tasks worse than the baseline's; None for other tasks than those, or
    where the baseline has not measured them."""
    learned = [run.learned for run in reference.runs.values()]
    if not learned or len({len(scores) for scores in learned}) != 1 or not learned[0]:
        return None
    means = [spread([s for s in scores if s is not None]) for scores in zip(*learned, strict=True)]
    free = [found.mean if found is not None else None for found in means]
    values = [
        intransigence([[score] * len(free) for score in run.learned], free)
        for run in cell.runs.values()
        if len(run.learned) == len(free)
    ]
    return spread([value for value in values if value is not None])


def _test(cells: Sequence[Cell], reference: Cell) -> None:
    wanted: list[tuple[Cell, str, float]] = []
    for cell in cells:
        names = _tested(cell)
        for name in sorted(names) if cell is not reference else ():
            ours, theirs = _by_seed(cell.runs, name), _by_seed(reference.runs, name)
            if (p_value := paired_p_value(ours, theirs)) is not None:
                wanted.append((cell, name, p_value))
    for (cell, name, _), adjusted in zip(wanted, holm([p for *_, p in wanted]), strict=True):
        cell.p_values[name] = adjusted
    for cell in cells:
        if (only := _only_task(cell)) in cell.p_values and ACCURACY in cell.measures:
            cell.p_values[ACCURACY] = cell.p_values[str(only)]


def _tested(cell: Cell) -> set[str]:
    """Return the measures that are tested. The accuracy of a single task is that task's, and no test of its own."""
    names = {name for run in cell.runs.values() for name in run.outcomes}
    return names - {*HIDDEN_TESTS} - further_of(cell) - ({ACCURACY} if _only_task(cell) is not None else set())


def _only_task(cell: Cell) -> str | None:
    """Return the task whose rows alone make the accuracy; None where there are several."""
    names = {name for run in cell.runs.values() if ACCURACY in run.outcomes for name in run.outcomes}
    tasks = names - {*SAFETY, ACCURACY} - further_of(cell)
    return next(iter(tasks)) if len(tasks) == 1 else None


def _by_seed(runs: Mapping[str, RunNumbers], name: str) -> dict[str, Any]:
    return {seed: run.outcomes[name] for seed, run in runs.items() if name in run.outcomes}


def _times(cell: Cell, reference: Cell) -> dict[str, float]:
    found = {}
    for name in BUDGET[:-1]:
        ours, theirs = cell.measures.get(name), reference.measures.get(name)
        if ours is not None and theirs is not None and theirs.mean > 0:
            found[name] = ours.mean / theirs.mean
    return found


def _trade(cell: Cell) -> tuple[Spread, Spread] | None:
    """Return the attack success rate and the accuracy of a cell; None where one was not measured."""
    asr, accuracy = cell.measures.get("asr"), cell.measures.get(ACCURACY)
    return (asr, accuracy) if asr is not None and accuracy is not None else None
