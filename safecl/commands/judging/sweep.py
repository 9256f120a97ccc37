"""`safecl sweep CFG KEY=A,B ...`: a grid of runs, its table, and the winner's config."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from safecl.commands.spinner import lines_of
from safecl.config import ConfigError, load_config
from safecl.config.parsing import apply_overrides, read_tree
from safecl.exits import ExitCode
from safecl.storage.durable import replace_file
from safecl.sweeping.axes import SEED, PlannedRun, plan_runs, read_axes
from safecl.sweeping.choosing import Objective, check_objective, read_objective
from safecl.sweeping.collecting import RunNumbers, read_numbers
from safecl.sweeping.formats import note_of, row_of, write_table
from safecl.sweeping.running import LOGS, Ending, Sweep, is_finished
from safecl.sweeping.table import Cell, SweepTable, make_table, shown_measures
from safecl.terminal import Terminal

SWEEP, BEST = "sweep.json", "best.yaml"


@dataclass(frozen=True)
class SweepOptions:
    """The options of the command line besides the config and the axes."""

    folder: Path | None = None
    ranks: int = 1
    parallel: int = 1
    baseline: str | None = None
    pick: str | None = None
    table_only: bool = False
    """Make the table of what is finished, and run nothing."""


def sweep_runs(config: Path, axes: Sequence[str], options: SweepOptions) -> ExitCode:
    """Run what is missing, write the table, and choose the winner. Raises ConfigError before anything is run.

    Returns FAILED where a run failed, GATE where no cell keeps the objective's conditions.
    """
    objective = read_objective(options.pick) if options.pick is not None else None
    base = load_config(config, [])
    folder = options.folder or Path(base.output)
    runs = plan_runs(read_axes(axes), folder)
    cells = list(dict.fromkeys(run.cell for run in runs))
    baseline = options.baseline or cells[0]
    if baseline not in cells:
        raise ConfigError(f"--baseline {baseline!r} is no cell of this sweep; there are {', '.join(cells)}")
    for run in runs:  # a wrong value is reported before hours of other runs
        load_config(config, [*run.overrides, f"output={run.folder}"])
    console = Terminal()
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / SWEEP, json.dumps({"config": str(config), "axes": list(axes), "baseline": baseline}) + "\n")
    endings = [] if options.table_only else _run(config, runs, options, console)
    finished = [ending.run for ending in endings if ending.has_results]
    if options.table_only:
        finished = [run for run in runs if is_finished(config, run)]
    table = _table(runs, finished, baseline)
    _print(table, console)
    winner = _choose(objective, table, folder) if objective is not None else None
    for path in write_table(table, folder, options.pick, winner):
        console.print(f"wrote {path}")
    failed = [ending for ending in endings if not ending.has_results]
    if objective is None:
        return ExitCode.FAILED if failed else ExitCode.DONE
    if winner is None:
        console.print(f"no cell keeps: {options.pick}", style="bold red")
        return ExitCode.GATE
    replace_file(folder / BEST, _config_of(config, winner, folder))
    console.print(f"{options.pick}: {winner.name}; its config is {folder / BEST}", style="bold")
    return ExitCode.FAILED if failed else ExitCode.DONE


def _run(config: Path, runs: Sequence[PlannedRun], options: SweepOptions, console: Terminal) -> list[Ending]:
    def say(line: str) -> None:
        console.print(line)
        said()

    sweep = Sweep(config, runs, ranks=options.ranks, parallel=options.parallel, say=say)
    with lines_of(sweep.position) as said:
        say(f"{len(runs)} runs, {options.parallel} at a time, {options.ranks} rank{'s' * (options.ranks > 1)} each")
        return sweep.run()


def _choose(objective: Objective, table: SweepTable, folder: Path) -> Cell | None:
    """Return the winner. Raises ConfigError for an objective on what was not measured, once the table is written: the
    runs may have taken days."""
    try:
        check_objective(objective, table)
    except ConfigError:
        write_table(table, folder)
        raise
    return objective.winner(table.cells)


def _table(runs: Sequence[PlannedRun], finished: Collection[PlannedRun], baseline: str) -> SweepTable:
    """Read the finished runs. Where the baseline has none, the first cell with one takes its place. Raises ConfigError
    where there is none at all."""
    cells: dict[str, Cell] = {}
    unfinished = []
    for run in runs:
        settings = tuple(override for override in run.overrides if not override.startswith(f"{SEED}="))
        cell = cells.setdefault(run.cell, Cell(run.cell, settings, {}))
        numbers = _numbers(run) if run in finished else None
        if numbers is None:
            unfinished.append(run.name)
        else:
            cell.runs[run.seed or ""] = numbers
    known = [cell for cell in cells.values() if cell.runs]
    if not known:
        raise ConfigError(f"no run of the sweep has finished, so there is no table; see {runs[0].folder.parent / LOGS}")
    return make_table(known, baseline if cells[baseline].runs else known[0].name, unfinished, wanted=baseline)


def _numbers(run: PlannedRun) -> RunNumbers | None:
    """Read a run's results; None where they cannot be read."""
    try:
        return read_numbers(run.folder)
    except ConfigError:
        return None


def _print(table: SweepTable, console: Terminal) -> None:
    """Print one block per cell: a wide table does not fit a terminal."""
    names = shown_measures(table)
    for cell in table.cells:
        texts = row_of(cell, table)
        console.print(f"\n{texts[0]}", style="bold")
        for name, text in zip([*names, "Pareto", "gate", "bytes"], texts[2:], strict=False):
            if text != "-":
                console.print(f"  {name:<22} {text}")
    console.print(f"\n{note_of(table)}\n", style="dim")


def _config_of(config: Path, winner: Cell, folder: Path) -> str:
    """Return the config of a cell: the sweep's with the cell's settings, and a run folder of its own."""
    tree = apply_overrides(read_tree(config), [*winner.overrides, f"output={folder / 'best'}"])
    head = f"# The cell `{winner.name}` of the sweep in {folder}.\n"
    return head + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)
