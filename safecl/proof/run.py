"""`safecl proof`: starts the ranks, shows each failure once it is measured, prints the verdict. Imports no torch."""

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
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from safecl.distributed.spawn import run_ranks
from safecl.exits import ExitCode
from safecl.proof.finding import Finding
from safecl.proof.worker import SAFECL, USUAL
from safecl.storage.durable import replace_file
from safecl.terminal import Terminal

NUM_RANKS = 2
NAMES = ("gathered-ema", "two-backwards", "rounded-logits", "lost-tail", "torn-save")
_SETS = {  # work of each set of ranks, and the text of the bar
    "measure": "measuring",
    "save-usual": "killing ranks in the middle of an in-place save",
    "save-safecl": "killing ranks in the middle of safecl's save",
    "load": "starting again from what is left",
}
_SECONDS_TO_DIE = 20.0  # for a rank after its peer was killed


def run_proof(folder: Path) -> int:
    """Measure everything and print it. An earlier proof in `folder` is replaced.

    Returns: ExitCode.FAILED where safecl itself was wrong.
    """
    console = Terminal()
    began = time.perf_counter()
    _clean(folder)
    console.print(
        "Silent failures of continual fine-tuning, each measured here, and safecl on the same task. "
        f"{NUM_RANKS} ranks, CPU, no model files.\n"
    )
    if code := _run_sets(folder, console):
        return code
    findings = _findings(folder)
    seconds = time.perf_counter() - began
    _write_results(folder, findings, seconds)
    console.print(table_of(findings), soft_wrap=False)
    console.print(verdict(findings), style="bold")
    libraries = f"DeepSpeed {version('deepspeed')} and torch {version('torch')}"
    console.print(f"{seconds:.0f} seconds with {libraries}. Numbers: {folder / 'proof.json'}")
    return ExitCode.DONE if all(finding.holds for finding in findings) else ExitCode.FAILED


def _clean(folder: Path) -> None:
    """Remove the files of an earlier proof, and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (USUAL, SAFECL):
        shutil.rmtree(folder / name, ignore_errors=True)
    results = [folder / f"{name}.json" for name in ("proof", *NAMES)]
    for path in [*results, *folder.glob("saved-*-rank*.digest")]:
        path.unlink(missing_ok=True)


def _run_sets(folder: Path, console: Terminal) -> int:
    """Run each set of ranks. Returns 0, or the exit code of the first set that did not end as it should."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn()
    reported: set[str] = set()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(NAMES) + 2)
        for done, (work, what) in zip((0, 0, 1, 2), _SETS.items(), strict=True):

            def watch(done: int = done) -> None:
                _report(_findings(folder), reported, console)
                bar.update(task, completed=len(reported) + done)

            bar.update(task, description=f"{what:<48}")
            if code := _run_set(folder, work, console, watch):
                return code
    return 0


def _run_set(folder: Path, work: str, console: Terminal, watch: Callable[[], None]) -> int:
    """Run one set of ranks. Returns 0 where they ended as they should: killed in the middle of a save, or well."""
    is_killed = work.startswith("save")
    patience = _SECONDS_TO_DIE if is_killed else 0.0
    code = run_ranks("safecl.proof.worker", [str(folder), work], NUM_RANKS, watch=watch, patience=patience)
    if is_killed and code != -signal.SIGXFSZ:
        message = f"safecl: failed: no rank was killed in {work} (exit code {code})"
        console.print(message, style="bold red")
        return ExitCode.FAILED
    if is_killed or code == 0:
        return 0
    return ExitCode.FAILED if code < 0 else code


def _report(findings: list[Finding], reported: set[str], console: Terminal) -> None:
    """Print a line for each new finding where there is no bar."""
    for finding in findings:
        if finding.name not in reported and not console.is_terminal:
            console.print(f"measured {finding.name} ({finding.seconds:.1f} s)")
        reported.add(finding.name)


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
    """Make a table with one row per failure: the right value, that of the usual way, and that of safecl."""
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
    """Say how many failures were seen and whether safecl was right, and name the exceptions."""
    not_seen, wrong = [f.name for f in findings if not f.seen], [f.name for f in findings if not f.holds]
    num_seen = len(findings) - len(not_seen)
    text = f"{num_seen} of {len(findings)} failures seen here; no training step reported any of them."
    text += f" Not seen: {', '.join(not_seen)}." if not_seen else ""
    return text + (f" safecl is WRONG in: {', '.join(wrong)}." if wrong else " safecl is right in all.")
