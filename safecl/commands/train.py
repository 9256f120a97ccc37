"""`safecl train CFG`: one process as it is, several under torchrun or the deepspeed launcher."""

from __future__ import annotations

from pathlib import Path

from safecl import launcher
from safecl.commands.ending import Ending, ExitCode, stderr
from safecl.commands.preflight import preflight
from safecl.config import RunConfig


def train_run(config: RunConfig, *, fresh: bool = False) -> ExitCode:
    """Trains, or goes on with what is in the run folder; returns how the run ended.

    Raises ConfigError for what can be said before the model is loaded; with `fresh` also for a folder that holds a run.
    """
    launcher.join_launcher()
    preflight(config)
    Ending.run_folder = Path(config.output)
    from safecl.engine.trainer import Trainer
    from safecl.scan import UploadRefused

    try:
        result = Trainer(config, fresh=fresh).fit()
    except UploadRefused as refused:
        if launcher.rank() == 0:
            stderr.print(f"safecl: upload refused: {refused}", style="bold red", markup=False)
        return ExitCode.GATE
    if result.stopped:
        return ExitCode.STOPPED
    return ExitCode.DONE if result.gate is None or result.gate.passed else ExitCode.GATE
