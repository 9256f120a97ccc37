"""`safecl train CFG`: one process as it is, several under torchrun or the deepspeed launcher."""

from __future__ import annotations

from pathlib import Path

from safecl import launcher
from safecl.commands.ending import Ending, ExitCode
from safecl.commands.preflight import preflight
from safecl.config import RunConfig


def train_run(config: RunConfig) -> ExitCode:
    """Trains; returns how the run ended. Raises ConfigError for what can be said before the model is loaded."""
    launcher.join_launcher()
    preflight(config)
    Ending.run_folder = Path(config.output)
    from safecl.engine.trainer import Trainer

    result = Trainer(config).fit()
    return ExitCode.DONE if result.gate is None or result.gate.passed else ExitCode.GATE
