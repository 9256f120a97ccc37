"""`safecl eval`: measures a run's tuned model, or any model folder, without training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safecl.commands.preflight import refuse_unwritable, settle_hub
from safecl.commands.spinner import working
from safecl.config import load_config
from safecl.distributed import environment
from safecl.exits import ExitCode
from safecl.storage.locks import RESULTS_LOCK, waiting_lock
from safecl.terminal import Terminal

if TYPE_CHECKING:
    from safecl.evaluation.harness import HarnessTasks


def evaluate_and_print(
    target: str, overrides: list[str], output: Path | None, harness: HarnessTasks | None = None
) -> ExitCode:
    """Measure, print the table on rank 0, and name the folder of results.json. Returns ExitCode.GATE where a gate is
    not passed."""
    environment.join_launcher()
    refuse_unwritable(output or _default_output(target, overrides))
    settle_hub([target])
    with working(f"measuring {target}"):
        from safecl.engine.artifacts.base_model import model_hash
        from safecl.evaluation import evaluate_target, results_table

        result = evaluate_target(target, overrides, output=output, hash_of=model_hash, harness=harness)
    if environment.rank() == 0:
        console = Terminal()
        console.print(f"measured {result.model}")
        console.print(results_table([result.evaluation]), soft_wrap=False)
        for note in result.notes:
            console.print(f"note: {note}", style="yellow")
        for warning in result.evaluation.warnings:
            console.print(f"warning: {warning}")
        if result.gate is not None:
            console.print(result.gate.message)
        _write_page(result.folder, console)
        console.print(f"results in {result.folder}")
    return ExitCode.DONE if result.gate is None or result.gate.passed else ExitCode.GATE


def _write_page(folder: Path, console: Terminal) -> None:
    """Write report.html. An evaluation without it has not failed: all that the page shows is in results.json."""
    from safecl.report.run import REPORT, write_run_report

    try:
        with waiting_lock(folder / RESULTS_LOCK):
            write_run_report(folder)
    except OSError as error:
        console.print(f"{REPORT} could not be written: {error.strerror}; `safecl report {folder}` makes it")


def _default_output(target: str, overrides: list[str]) -> Path:
    """Return the folder of the results without --output. Reads the config, so that a wrong one is refused before torch
    is imported."""
    if target.endswith((".yaml", ".yml")):
        return Path(load_config(target, overrides).output)
    return Path(target) if (Path(target) / "config.yaml").is_file() else Path("runs")
