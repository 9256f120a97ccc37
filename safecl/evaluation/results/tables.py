"""Evaluations as a terminal table: one row per measure, one column per moment."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from rich import box
from rich.table import Table
from rich.text import Text

from safecl.evaluation.results.moment import Evaluation
from safecl.evaluation.scoring.keywords import SCORERS
from safecl.evaluation.statistics.intervals import Mean, Rate
from safecl.terminal import plain

Value = Rate | Mean | None
Row = tuple[str, bool, list[Value]]
"""A measure: title, whether higher is better, one value per moment."""

MAX_COLUMNS = 6
TERMINAL_COLUMNS = 5  # 80 characters hold as many intervals beside the titles
INTERVAL_WIDTH = len("0.00-0.00")
MAX_WIDE_COLUMNS = 2  # 80 characters hold two values with their intervals on one line


def results_table(evaluations: Sequence[Evaluation]) -> Table:
    """Make a table of all moments with 95 % intervals. Of many moments it shows the first, the last and the worst."""
    shown = moments(evaluations, TERMINAL_COLUMNS)
    wide = len(shown) <= MAX_WIDE_COLUMNS
    padding = (0, 1) if wide else (0, 1, 0, 0)
    title = "measured, with 95 % intervals"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=padding)
    table.add_column("", overflow="fold")
    for evaluation in shown:
        step = f"\nstep {evaluation.step}" if len(shown) > 1 else ""  # a model measured alone has no steps
        header = plain(f"{evaluation.when}{step}")
        table.add_column(header, justify="right", overflow="fold", min_width=None if wide else INTERVAL_WIDTH)
    for title, higher_is_better, values in measures(shown):
        table.add_row(plain(title), *_cells(values, higher_is_better, wide))
    if len(shown) < len(evaluations):
        table.caption = (
            f"{len(shown)} of {len(evaluations)} moments shown: first, last, and the highest attack success rates"
        )
    return table


def moments(evaluations: Sequence[Evaluation], most: int = MAX_COLUMNS) -> list[Evaluation]:
    """Return all moments, or of more than `most` the first, the last and those with the highest attack success
    rates."""
    if len(evaluations) <= most:
        return list(evaluations)
    inner = range(1, len(evaluations) - 1)
    worst = sorted(inner, key=lambda place: -_asr(evaluations[place]))
    kept = {0, len(evaluations) - 1, *worst[: most - 2]}
    return [evaluations[place] for place in sorted(kept)]


def _asr(evaluation: Evaluation) -> float:
    asr = evaluation.safety.asr.value if evaluation.safety else -1.0
    return asr if math.isfinite(asr) else -1.0


def measures(evaluations: Sequence[Evaluation]) -> list[Row]:
    """Return every measure that any moment has, with one value per moment, None where it was not measured."""
    rows: list[Row] = []

    def add(title: str, value_of: Callable[[Evaluation], Value], higher_is_better: bool = False) -> None:
        values = [value_of(evaluation) for evaluation in evaluations]
        if any(value is not None for value in values):
            rows.append((title, higher_is_better, values))

    named = (name for e in evaluations if e.safety for name in (e.safety.scorer, *e.safety.asr_by_scorer))
    judges = {name: None for name in named if name not in SCORERS}
    for scorer in (*judges, *SCORERS):
        add(f"ASR {scorer}", partial(_asr_by, scorer))
    for title, name in _SAFETY_ROWS.items():
        if title == OVER_REFUSAL:
            for scorer in dict.fromkeys(e.safety.over_refusal_scorer for e in evaluations if e.safety):
                add(f"{title} {scorer}", partial(_over_refusal_by, scorer))
        else:
            add(title, partial(_safety_rate, name))
    safe = [evaluation.safety for evaluation in evaluations if evaluation.safety is not None]
    for category in dict.fromkeys(name for safety in safe for name in safety.by_category):
        for name in dict.fromkeys(name for safety in safe for name in safety.by_category.get(category, ())):
            title = _CATEGORY_ROWS.get(name, f"  ASR {name}")
            add(f"{title}, {category}", partial(_rate_of_category, category, name))
    for variant in dict.fromkeys(name for safety in safe for name in safety.variants):
        for title, name in _VARIANT_ROWS.items():
            add(f"{title}, {variant}", partial(_rate_of_variant, variant, name))
        for scorer in judges:
            add(f"  ASR {scorer}, {variant}", partial(_asr_of_variant, variant, scorer))
    for title, name in _THOUGHT_ROWS.items():
        add(title, partial(_thought_rate, name))
    add("probe, leaning to comply", _probed)
    add("KL to the aligned model", _kl)
    for name in dict.fromkeys(name for evaluation in evaluations for name in evaluation.tasks):
        result = next(e.tasks[name] for e in evaluations if name in e.tasks)
        add(f"{name} {result.metric}", partial(_task_value, name), result.higher_is_better)
        details = dict.fromkeys(d for e in evaluations if name in e.tasks for d in e.tasks[name].details)
        for detail in details:
            add(
                f"  {detail}", partial(_task_detail, name, detail), detail not in ("truncated", "cut_off", "perplexity")
            )
    return rows


def _asr_by(scorer: str, evaluation: Evaluation) -> Value:
    return evaluation.safety.asr_by_scorer.get(scorer) if evaluation.safety else None


def _rate_of_category(category: str, name: str, evaluation: Evaluation) -> Value:
    return evaluation.safety.by_category.get(category, {}).get(name) if evaluation.safety else None


def _asr_of_variant(variant: str, scorer: str, evaluation: Evaluation) -> Value:
    found = evaluation.safety.variants.get(variant) if evaluation.safety else None
    return found.asr_by_scorer.get(scorer) if found is not None and found.scorer != scorer else None


def _rate_of_variant(variant: str, name: str, evaluation: Evaluation) -> Value:
    found = evaluation.safety.variants.get(variant) if evaluation.safety else None
    rate: Rate | None = getattr(found, name) if found is not None else None
    return rate


def _over_refusal_by(scorer: str, evaluation: Evaluation) -> Value:
    safety = evaluation.safety
    return safety.over_refusal if safety and safety.over_refusal_scorer == scorer else None


def _safety_rate(name: str, evaluation: Evaluation) -> Value:
    rate: Rate | None = getattr(evaluation.safety, name) if evaluation.safety else None
    return rate


def _thought_rate(name: str, evaluation: Evaluation) -> Value:
    thoughts = evaluation.safety.thoughts if evaluation.safety else None
    rate: Rate | None = getattr(thoughts, name) if thoughts else None
    return rate


def _probed(evaluation: Evaluation) -> Value:
    return evaluation.probe.complying if evaluation.probe else None


def _kl(evaluation: Evaluation) -> Value:
    return evaluation.kl_to_aligned


def _task_value(name: str, evaluation: Evaluation) -> Value:
    return evaluation.tasks[name].value if name in evaluation.tasks else None


def _task_detail(name: str, detail: str, evaluation: Evaluation) -> Value:
    return evaluation.tasks[name].details.get(detail) if name in evaluation.tasks else None


OVER_REFUSAL = "over-refusal"  # its title ends with the scorer, as that of the attack success rate
_SAFETY_ROWS = {
    "  not refused and on task": "asr_on_task",
    "  affirmative openings": "affirmative",
    "  complied, by rules": "complied",
    "  off-task or incoherent": "off_task",
    OVER_REFUSAL: "over_refusal",
    "  off-task or incoherent ": "benign_off_task",
    "answers cut off": "truncated",
    "thoughts cut off": "cut_off",
}
_CATEGORY_ROWS = {"asr": "  ASR", "complied": "  complied, by rules"}
_VARIANT_ROWS = {"ASR": "asr", "  complied, by rules": "complied", "  over-refusal": "over_refusal"}
_THOUGHT_ROWS = {
    "thoughts not refused": "asr",
    "  affirmative openings ": "affirmative",
    "thoughts refused, benign": "over_refusal",
}


def shown_value(value: Rate | Mean) -> str:
    """Return the value with three digits."""
    return f"{value.value:.3f}" if math.isfinite(value.value) else "undecided"


def _cells(values: list[Value], higher_is_better: bool, wide: bool) -> list[Text]:
    """Make the cells of a row, green or red where an interval does not overlap the first one. wide: whether there is
    room for the interval beside the value."""
    first = next((value for value in values if value is not None), None)
    cells = []
    for value in values:
        if value is None or first is None:
            cells.append(Text("-", style="dim"))
            continue
        apart = value.low > first.high or value.high < first.low
        better = (value.value > first.value) == higher_is_better
        style = ("green" if better else "red") if apart else ""
        interval = f" [{value.low:.3f}, {value.high:.3f}]" if wide else f"\n{value.low:.2f}-{value.high:.2f}"
        cells.append(Text(shown_value(value), style=style).append(interval, style="dim"))
    return cells
