"""`safecl proof`: starts the ranks, shows each failure as it is measured, and says what was seen. Imports no torch."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from safecl.distributed.spawn import run_ranks
from safecl.exits import ExitCode
from safecl.proof.finding import Finding
from safecl.proof.worker import SAFECL, USUAL
from safecl.storage.durable import replace_file

NUM_RANKS = 2
NAMES = ("gathered-ema", "two-backwards", "rounded-logits", "lost-tail", "torn-save")
_SETS = {  # work of each set of ranks: what the bar says meanwhile
    "measure": "measuring",
    "save-usual": "killing ranks in the middle of an in-place save",
    "save-safecl": "killing ranks in the middle of safecl's save",
    "load": "starting again from what is left",
}
_SECONDS_TO_DIE = 20.0  # for a rank whose peer was killed already


def run_proof(folder: Path) -> int:
    """Measures everything and prints it; ExitCode.FAILED where safecl itself was wrong. An earlier proof in `folder` is
    renewed."""
    console = Console(highlight=False, soft_wrap=True)
    began = time.perf_counter()
    _clean(folder)
    console.print(
        f"Silent failures of continual fine-tuning, each measured here beside safecl. {NUM_RANKS} ranks, CPU, no model files.\n"
    )
    if code := _run_sets(folder, console):
        return code
    findings = _findings(folder)
    seconds = time.perf_counter() - began
    _write_results(folder, findings, seconds)
    console.print(table_of(findings), soft_wrap=False)
    console.print(verdict(findings), style="bold", markup=False)
    console.print(
        f"{seconds:.0f} seconds with DeepSpeed {version('deepspeed')} and torch {version('torch')}. Numbers: {folder / 'proof.json'}"
    )
    return ExitCode.DONE if all(finding.holds for finding in findings) else ExitCode.FAILED


def _clean(folder: Path) -> None:
    """Removes what an earlier proof left here, and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (USUAL, SAFECL):
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in [
        folder / "proof.json",
        *(folder / f"{name}.json" for name in NAMES),
        *folder.glob("saved-*-rank*.digest"),
    ]:
        path.unlink(missing_ok=True)


def _run_sets(folder: Path, console: Console) -> int:
    """Runs each set of ranks; an exit code where one ended as it should not."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task, told = bar.add_task("", total=len(NAMES) + 2), set()
        for done, (work, what) in zip((0, 0, 1, 2), _SETS.items(), strict=True):

            def watch(done: int = done) -> None:
                _tell(_findings(folder), told, console)
                bar.update(task, completed=len(told) + done)

            bar.update(task, description=f"{what:<48}")
            if code := _run_set(folder, work, console, watch):
                return code
    return 0


def _run_set(folder: Path, work: str, console: Console, watch: Callable[[], None]) -> int:
    """0 where the ranks ended as they should: killed in the middle of a save, or well."""
    is_killed = work.startswith("save")
    patience = _SECONDS_TO_DIE if is_killed else 0.0
    code = run_ranks("safecl.proof.worker", [str(folder), work], NUM_RANKS, watch=watch, patience=patience)
    if is_killed and code != -signal.SIGXFSZ:
        console.print(
            f"safecl: failed: no rank was killed in {work} (exit code {code})", style="bold red", markup=False
        )
        return ExitCode.FAILED
    return 0 if is_killed or code == 0 else ExitCode.FAILED if code < 0 else code


def _tell(findings: list[Finding], told: set[str], console: Console) -> None:
    """A line for each new one where there is no bar."""
    for finding in findings:
        if finding.name not in told and not console.is_terminal:
            console.print(f"measured {finding.name} ({finding.seconds:.1f} s)", markup=False)
        told.add(finding.name)


def _findings(folder: Path) -> list[Finding]:
    return [Finding.read(path) for name in NAMES if (path := folder / f"{name}.json").exists()]


def _write_results(folder: Path, findings: list[Finding], seconds: float) -> None:
    versions = {name: version(name) for name in ("safecl", "deepspeed", "torch")}
    result = {
        "versions": versions,
        "num_ranks": NUM_RANKS,
        "seconds": round(seconds, 1),
        "findings": [asdict(f) for f in findings],
    }
    replace_file(folder / "proof.json", json.dumps(result, indent=1))
    for finding in findings:
        (folder / f"{finding.name}.json").unlink()


def table_of(findings: list[Finding]) -> Table:
    """One row per failure: what is right, what the usual way gave, what safecl gave."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("failure", "right", "usual way", "safecl"):
        table.add_column(title, justify="left" if title == "failure" else "right", no_wrap=title != "failure")
    for finding in findings:
        name = Text(finding.failure).append(f"\n  {finding.quantity}", style="dim")
        usual, ours = (Text("\n" + value, style=style) for value, style in _styled(finding))
        table.add_row(name, Text("\n" + finding.right), usual, ours)
    return table


def _styled(finding: Finding) -> tuple[tuple[str, str], tuple[str, str]]:
    return (finding.usual, "red" if finding.seen else ""), (finding.safecl, "green" if finding.holds else "bold red")


def verdict(findings: list[Finding]) -> str:
    """How many failures were seen, and whether safecl was right; names what was not."""
    seen, wrong = [f for f in findings if f.seen], [f.name for f in findings if not f.holds]
    not_seen = [f.name for f in findings if not f.seen]
    text = f"{len(seen)} of {len(findings)} failures seen here; no training step reported any of them."
    text += f" Not seen: {', '.join(not_seen)}." if not_seen else ""
    return text + (f" safecl is WRONG in: {', '.join(wrong)}." if wrong else " safecl is right in all.")
