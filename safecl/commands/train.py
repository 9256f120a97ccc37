"""`safecl train CFG`: one process as it is, several under torchrun or the deepspeed launcher."""

from __future__ import annotations

from pathlib import Path

from safecl import launcher
from safecl.commands.ending import Ending, ExitCode
from safecl.config import ConfigError, RunConfig


def train_run(config: RunConfig) -> ExitCode:
    """Trains; returns how the run ended. Raises ConfigError for what can be said before the model is loaded."""
    launcher.join_launcher()
    Ending.run_folder = make_run_folder(config)
    from safecl.engine.trainer import Trainer

    result = Trainer(config).fit()
    if getattr(result, "stopped", False):
        return ExitCode.STOPPED
    return ExitCode.DONE if result.gate is None or result.gate.passed else ExitCode.GATE


def make_run_folder(config: RunConfig) -> Path:
    """Creates the run folder; a folder that cannot be made is told before an hour of training, not after."""
    folder = Path(config.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{launcher.rank()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"output: the run folder {folder} cannot be written: {error.strerror}") from None
    return folder
