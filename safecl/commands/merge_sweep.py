"""`safecl merge KIND --sweep`: measures a merge at many settings, prints the table, and writes the best point."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from rich import box
from rich.table import Table

from safecl.commands.merge import Parents
from safecl.commands.spinner import announce, working
from safecl.config import ConfigError, load_config
from safecl.exits import ExitCode, stderr
from safecl.merging.points import parse_sweeps, text_of
from safecl.merging.registry import parse_settings, read_settings
from safecl.terminal import Terminal, plain

if TYPE_CHECKING:
    from safecl.evaluation.statistics.intervals import Mean, Rate
    from safecl.merging.choice import Measured
    from safecl.merging.sweeps import SweepReport


def sweep_models(
    kind: str,
    overrides: list[str],
    sweeps: list[str],
    config: Path,
    pick: str | None,
    *,
    out: Path | None,
    parents: Parents,
    as_json: bool,
) -> ExitCode:
    """Measure all points, print them, and write the picked one. Returns ExitCode.GATE where no point passes the gate.

    Raises ConfigError for models, settings or a config that do not fit.
    """
    settings, points = parse_settings(overrides), parse_sweeps(sweeps) if sweeps else [{}]
    read_settings(kind, {**settings, **points[0]})  # before torch is loaded
    if out is None:
        raise ConfigError(f"{kind}: no folder for the table and the plot: -o OUT")
    run = load_config(config)
    announce("merge", f"a sweep of {kind}, loading torch")
    from safecl.merging.greedy import greedy_soup
    from safecl.merging.sweeps import sweep

    measured: list[Measured] = []

    def note(point: Measured) -> None:
        measured.append(point)
        stderr.print(point.evaluation.one_line())

    with working(lambda: f"measuring merges, {len(measured)} done"):
        if pick == "greedy":
            report = greedy_soup(parents.tuned, config=run, out=out, note=note, **settings)
        else:
            rule = cast(Literal["gate"] | None, pick)
            report = sweep(kind, points, config=run, out=out, pick=rule, note=note, **vars(parents), **settings)
    if as_json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        _print(report, Terminal(), pick)
    return ExitCode.GATE if pick is not None and report.picked is None else ExitCode.DONE


def _print(report: SweepReport, console: Terminal, pick: str | None) -> None:
    console.print(sweep_table(report), soft_wrap=False)
    if report.merge is not None and report.picked is not None:
        point = text_of(report.points[report.picked].settings)
        console.print(f"picked: {point}")
        console.print(str(report.merge))
    elif pick is not None:
        console.print("no point passes the gate, so no model was written")
    console.print(f"table and plot: {report.out}/sweep.json, sweep.svg")


def sweep_table(report: SweepReport) -> Table:
    """Make a table with one row per point; intervals (95 %) are below the rates."""
    table = Table(title=f"{report.kind}, with 95 % intervals", title_justify="left", box=box.SIMPLE_HEAD)
    table.caption = "front: no other point has both a lower ASR and a higher utility"
    table.add_column("point")
    tasks = list(report.points[0].evaluation.tasks)
    for title in ("ASR", "affirmative", "off-task", "over-refusal", *tasks, "gate", ""):
        table.add_column(plain(title), justify="right")
    for index, point in enumerate(report.points):
        safety = point.evaluation.safety
        rates = [safety.asr, safety.affirmative, safety.off_task, safety.over_refusal] if safety else [None] * 4
        values = [_cell(value) for value in (*rates, *(point.evaluation.tasks[name].value for name in tasks))]
        gate = point.gate.verdict if point.gate else ""
        mark = "picked" if index == report.picked else "front" if index in report.front else ""
        table.add_row(plain(text_of(point.settings)), *values, gate, mark)
    return table


def _cell(value: Rate | Mean | None) -> str:
    if value is None or not math.isfinite(value.value):
        return "" if value is None else "undecided"
    return f"{value.value:.3f}\n{value.low:.2f}-{value.high:.2f}"
