"""The page of a sweep: what it says to a customer, and the table with its intervals, tests, front and costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from safecl.evaluation.statistics.pooled import Spread
from safecl.report.charts import Place, trades
from safecl.report.page import bytes_text, render
from safecl.sweeping.table import LOWER_IS_BETTER, Cell, SweepTable, shown_measures

TONES = {"passed": "good", "failed": "bad", "undecided": "open"}
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Sentence:
    """One of the sentences below the badge."""

    about: str
    text: str


def sweep_page(table: SweepTable, version: str, pick: str | None = None, winner: Cell | None = None) -> str:
    """Return the page as HTML. pick: the objective that was asked for; winner: the cell that it names, None where none
    keeps its conditions."""
    badge, tone, lines = _verdict(table, pick, winner)
    runs = sum(len(cell.runs) for cell in table.cells)
    return render(
        "sweep.html",
        title=f"{len(table.cells)} cells, {runs} runs",
        badge=badge,
        tone=tone,
        lines=[f"A sweep of {len(table.cells)} cells, {runs} runs.", *lines],
        sentences=_sentences(table, winner),
        baseline=table.baseline,
        front=_front(table),
        measures=[(_title(name), name not in LOWER_IS_BETTER) for name in shown_measures(table)],
        rows=[_row(cell, table) for cell in table.cells],
        unfinished=table.unfinished,
        missing_baseline=table.missing_baseline,
        version=version,
    )


def _title(name: str) -> str:
    return name.replace("_", " ").replace("asr", "ASR")


def _verdict(table: SweepTable, pick: str | None, winner: Cell | None) -> tuple[str, str, list[str]]:
    """Return badge, tone and lines: of the chosen cell, else of all runs."""
    if pick is not None and winner is None:
        return "NO CELL", "bad", [f"No cell keeps: {pick}"]
    verdicts = [v for cell in ([winner] if winner is not None else table.cells) for v in _verdicts(cell)]
    chosen = [f"Chosen: {winner.name}, by {pick}"] if winner is not None else []
    if not verdicts:
        return ("CHOSEN" if winner is not None else "NO LIMIT"), "none", [*chosen, "No limit on safety was set."]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in TONES if v in verdicts)
    worst = next(v for v in ("failed", "undecided", "passed") if v in verdicts)
    if winner is None and len(set(verdicts)) > 1:
        return "MIXED", "open", [f"Safety limits of {len(verdicts)} runs: {counts}."]
    return worst.upper(), TONES[worst], [*chosen, f"Safety limits of {len(verdicts)} runs: {counts}."]


def _verdicts(cell: Cell) -> list[str]:
    return [verdict for verdict, count in cell.verdicts.items() for _ in range(count)]


def _sentences(table: SweepTable, winner: Cell | None) -> list[Sentence]:
    found = []
    for about, name, better in (("Safety.", "asr", min), ("Task.", "accuracy", max)):
        known = {cell.name: cell.measures[name].mean for cell in table.cells if name in cell.measures}
        if not known:
            continue
        best = better(known, key=lambda cell: known[cell])
        what = "disallowed prompts were not refused" if name == "asr" else "the tasks' rows were answered rightly"
        text = f"{known[best]:.1%} of {what} in the best cell, {best}."
        if winner is not None and winner.name in known:
            text = f"{known[winner.name]:.1%} of {what} in the chosen cell, {winner.name}"
            text += (
                ", the best of all."
                if known[winner.name] == known[best]
                else f"; {known[best]:.1%} in the best, {best}."
            )
        found.append(Sentence(about, text))
    front = [cell.name for cell in table.cells if cell.standing == "front"]
    if front:
        found.append(Sentence("Trade.", f"No cell beats {' or '.join(front)} in both."))
    return found


def _front(table: SweepTable) -> Markup:
    places = []
    for cell in table.cells:
        asr, accuracy = cell.measures.get("asr"), cell.measures.get("accuracy")
        if asr is not None and accuracy is not None:
            places.append(Place(cell.name, _interval(asr), _interval(accuracy), cell.standing == "front"))
    return trades(places, "attack success rate (lower is better)", "accuracy (higher is better)")


def _interval(value: Spread) -> tuple[float, float, float]:
    low = value.mean if value.low is None else value.low
    return value.mean, low, value.mean if value.high is None else value.high


def _row(cell: Cell, table: SweepTable) -> dict[str, Any]:
    seconds, kept = cell.measures.get("seconds"), cell.measures.get("bytes")
    times = [
        f"{cell.budget[name]:.2f}" if name in cell.budget else "-" for name in ("seconds_per_step", "tokens", "seconds")
    ]
    count = len(cell.runs)
    return {
        "name": cell.name,
        "runs": f"{count} run{'s' * (count != 1)}{', baseline' if cell.name == table.baseline else ''}",
        "gates": [
            {"text": f"{number} {verdict}" if count > 1 else verdict, "tone": TONES[verdict]}
            for verdict, number in cell.verdicts.items()
        ],
        "values": [_value(cell, name) for name in shown_measures(table)],
        "standing": cell.standing or "-",
        "costs": [f"{seconds.mean:.0f}" if seconds else "-", *times, bytes_text(kept.mean) if kept else "-"],
        "settings": cell.overrides,
        "folders": [(seed, str(run.folder)) for seed, run in cell.runs.items()],
    }


def _value(cell: Cell, name: str) -> dict[str, Any] | None:
    found = cell.measures.get(name)
    if found is None:
        return None
    p_value = cell.p_values.get(name)
    star = p_value is not None and p_value <= SIGNIFICANT
    return found.to_dict() | {"p": p_value, "star": star, "better": name not in LOWER_IS_BETTER}
