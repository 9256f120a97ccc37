"""The table of a sweep as CSV, JSON, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import safecl
from safecl.evaluation.statistics.pooled import Spread
from safecl.storage.durable import replace_file
from safecl.storage.sizes import format_bytes
from safecl.sweeping.page import sweep_page
from safecl.sweeping.pareto import pareto_svg
from safecl.sweeping.table import LOWER_IS_BETTER, Cell, SweepTable, shown_measures

_BUDGET_TITLES = {"seconds_per_step": "step time", "tokens": "tokens", "seconds": "seconds"}


def write_table(table: SweepTable, folder: Path, pick: str | None = None, winner: Cell | None = None) -> list[Path]:
    """Write table.csv, table.json, table.md, table.tex, report.html, and pareto.svg where there is a trade to draw.

    pick, winner: see `sweep_page`.
    """
    texts = {
        "table.csv": csv_of(table),
        "table.json": json.dumps(table.to_dict(), indent=2) + "\n",
        "table.md": markdown_of(table),
        "table.tex": latex_of(table),
        "report.html": sweep_page(table, safecl.__version__, pick, winner),
    }
    trades = [
        (cell.measures["asr"], cell.measures["accuracy"]) if cell.standing is not None else None for cell in table.cells
    ]
    if any(trade is not None for trade in trades):
        texts["pareto.svg"] = pareto_svg([cell.name for cell in table.cells], trades)
    for name, text in texts.items():
        replace_file(folder / name, text)
    return [folder / name for name in texts]


# ---------------------------------------------------------------------------------------------------------------- cells


def header_of(table: SweepTable) -> list[str]:
    titles = [f"{name} {'↓' if name in LOWER_IS_BETTER else '↑'}" for name in shown_measures(table)]
    return ["cell", "runs", *titles, "Pareto", "gate", "bytes", *(f"{title} ×" for title in _BUDGET_TITLES.values())]


def row_of(cell: Cell, table: SweepTable) -> list[str]:
    """Return the texts of a row: mean ± standard deviation [interval], and a star where the difference to the baseline
    is beyond chance (p <= 0.05 after Holm)."""
    values = [_value(cell, name) for name in shown_measures(table)]
    gate = ", ".join(f"{number} {verdict}" for verdict, number in cell.verdicts.items()) or "none"
    kept = cell.measures.get("bytes")
    costs = [f"{cell.budget[name]:.2f}" if name in cell.budget else "-" for name in _BUDGET_TITLES]
    return [
        cell.name + (" (baseline)" if cell.name == table.baseline else ""),
        str(len(cell.runs)),
        *values,
        cell.standing or "-",
        gate,
        format_bytes(int(kept.mean)) if kept is not None else "-",
        *costs,
    ]


def _value(cell: Cell, name: str) -> str:
    found = cell.measures.get(name)
    if found is None:
        return "-"
    star = "*" if cell.p_values.get(name, 1.0) <= 0.05 else ""
    return f"{_mean(found)}{star}{_interval(found)}"


def _mean(found: Spread) -> str:
    return f"{found.mean:.3f}" + (f" ± {found.std:.3f}" if found.num_runs > 1 else "")


def _interval(found: Spread) -> str:
    return f" [{found.low:.3f}, {found.high:.3f}]" if found.low is not None and found.high is not None else ""


# -------------------------------------------------------------------------------------------------------------- formats


def csv_of(table: SweepTable) -> str:
    """Return one line per cell, with a column for each number."""
    names = table.measures
    parts = ("mean", "std", "low", "high")
    head = ["cell", "baseline", "runs", *(f"{name}.{part}" for name in names for part in (*parts, "p_holm"))]
    head += ["pareto", "gate_passed", "gate_failed", "gate_undecided", *(f"{name}_times" for name in _BUDGET_TITLES)]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    for cell in table.cells:
        row: list[object] = [cell.name, cell.name == table.baseline, len(cell.runs)]
        for name in names:
            found = cell.measures.get(name)
            row += [_or_empty(getattr(found, part) if found else None) for part in parts]
            row.append(_or_empty(cell.p_values.get(name)))
        row += [cell.standing or "", *(cell.verdicts.get(v, 0) for v in ("passed", "failed", "undecided"))]
        writer.writerow([*row, *(_or_empty(cell.budget.get(name)) for name in _BUDGET_TITLES)])
    return buffer.getvalue()


def _or_empty(value: float | None) -> object:
    return "" if value is None else value


def markdown_of(table: SweepTable) -> str:
    """Return the table for people, with a note on what it shows."""
    head = header_of(table)
    lines = [_line(head), _line(["---"] * len(head)), *(_line(row_of(cell, table)) for cell in table.cells)]
    return "\n".join([*lines, "", note_of(table), ""])


def note_of(table: SweepTable) -> str:
    unfinished = f" Without results: {', '.join(table.unfinished)}." if table.unfinished else ""
    if table.missing_baseline is not None:
        unfinished += f" The baseline, {table.missing_baseline}, has none, and {table.baseline} takes its place."
    return (
        "Mean ± standard deviation over runs, [95 % interval pooled over runs with prompts as the sampling unit]. "
        f"* differs from {table.baseline} (exact paired test over prompts, p <= 0.05 after Holm's correction). "
        f"×: multiple of {table.baseline}.{unfinished}"
    )


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def latex_of(table: SweepTable) -> str:
    """Return a tabular that needs the package booktabs."""
    head = [_tex(text) for text in header_of(table)]
    rows = [" & ".join(_tex(text) for text in row_of(cell, table)) + r" \\" for cell in table.cells]
    lines = [
        "% needs \\usepackage{booktabs}; " + note_of(table),
        r"\begin{tabular}{l" + "r" * (len(head) - 1) + "}",
        r"\toprule",
        " & ".join(head) + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "*": r"$^{*}$",
} | {character: f"\\{character}" for character in "&%$#_{}"}


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)
