"""`safecl merge KIND`: merges model folders into a new one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from safecl.commands.spinner import announce, working
from safecl.config import ConfigError
from safecl.exits import stderr
from safecl.merging.registry import kind_module, kinds, parse_settings, read_settings
from safecl.terminal import Terminal


@dataclass(frozen=True)
class Parents:
    """The models and data of a merge, as on the command line."""

    base: str | None
    tuned: list[str]
    aligned: str | None
    data: Path | None


def merge_models(kind: str, overrides: list[str], *, out: Path | None, parents: Parents, as_json: bool) -> None:
    """Merge, and print the report. Raises ConfigError for models or settings that do not fit."""
    settings = parse_settings(overrides)
    read_settings(kind, settings)  # before torch is loaded
    if out is None:
        raise ConfigError(f"{kind}: no folder to write: -o OUT")
    announce("merge", f"{kind} of {', '.join(parents.tuned) or 'nothing'}, loading torch")
    from safecl.merging.run import merge

    with _progress_bar(kind) as progress:
        report = merge(kind, out=out, **vars(parents), progress=progress, **settings)
    if as_json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        Terminal().print(str(report))


def refuse_half_a_sweep(kind: str, sweep: list[str] | None, eval_: Path | None, pick: str | None) -> None:
    """Raise ConfigError where one of --sweep, --eval and --pick lacks another."""
    if pick not in (None, "gate", "greedy"):
        raise ConfigError(f"--pick {pick}: the rules are `gate`, and for soup `greedy`")
    if pick == "greedy" and (kind != "soup" or sweep or eval_ is None):
        raise ConfigError("--pick greedy is for `soup`, with --eval CFG and without --sweep")
    if sweep and eval_ is None:
        raise ConfigError("--sweep needs --eval CFG, the run config that says what is measured at each point")
    if eval_ is not None and not sweep and pick != "greedy":
        raise ConfigError("--eval needs --sweep KEY=FIRST:LAST:STEP; `safecl eval` measures one model")
    if pick == "gate" and not sweep:
        raise ConfigError("--pick needs --sweep and --eval: it chooses among measured points")


@contextlib.contextmanager
def _progress_bar(kind: str) -> Iterator[Callable[[int, int], None] | None]:
    """Show a bar on a terminal, and elsewhere a line at least every minute; on stderr, so that a pipe gets the report
    only."""
    if not stderr.is_terminal:
        with working(f"merging: {kind}"):
            yield None
        return
    name, share = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.percentage:>3.0f} %"))
    with Progress(name, BarColumn(), share, TimeRemainingColumn(), console=stderr, transient=True) as bar:
        task = bar.add_task(f"merging: {kind}", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_settings(kind: str) -> None:
    """Print what a kind of merge needs, and its settings with their defaults."""
    config = kind_module(kind).Config
    needs, console = config.needs, Terminal(soft_wrap=False)
    most = "" if needs.most == needs.fewest else f" to {needs.most}" if needs.most else " or more"
    parts = [f"{needs.fewest}{most} tuned"]
    parts += [f"{role} ({need})" for role, need in (("base", needs.base), ("aligned", needs.aligned)) if need != "no"]
    parts += [f"data: {needs.data}{' (optional)' * needs.data_optional}"] if needs.data else []
    console.print(f"{kinds().get(kind, kind)}\nmodels: {', '.join(parts)}")
    table = Table(box=None, pad_edge=False)
    for title in ("setting", "default", "meaning"):
        table.add_column(title)
    for name, field in config.model_fields.items():
        default = "required" if field.is_required() else str(field.get_default(call_default_factory=True))
        table.add_row(name, default, " ".join((field.description or "").split()))
    console.print(table)
