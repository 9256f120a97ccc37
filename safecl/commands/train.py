"""`safecl train CFG`: trains in one process, or in several under torchrun or the deepspeed launcher."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from safecl.commands.preflight import preflight
from safecl.config import RunConfig
from safecl.distributed import environment
from safecl.exits import ExitCode, end_undisturbed, stderr, tracebacks


def train_run(config: RunConfig, *, fresh: bool = False) -> ExitCode:
    """Train, or resume the run in the folder; return how it ended.

    Raises ConfigError, before the model is loaded where possible; with `fresh` also for a folder that holds a run.
    """
    environment.join_launcher()
    preflight(config)
    tracebacks.folder, tracebacks.needs = Path(config.output), lambda: memory_needs(config)
    from safecl.training.folder import EXIT_CODE, RunFolder

    code = _train(config, fresh)
    if environment.rank() == 0:
        with contextlib.suppress(OSError):
            RunFolder(Path(config.output)).write_exit_code(code)
            if code == ExitCode.STOPPED and "TORCHELASTIC_RUN_ID" in os.environ:
                print(
                    f"torchrun itself ends with 1; the exit code {code} is in {Path(config.output) / EXIT_CODE}",
                    flush=True,
                )
    return code


def memory_needs(config: RunConfig) -> str:
    """Say what `safecl check` predicts for the run."""
    from safecl.planning.costs.memory_report import memory_lines
    from safecl.planning.costs.model_shape import ModelShape
    from safecl.planning.costs.shapes import model_structure

    shape = ModelShape.of(model_structure(config.model), config)
    lines = memory_lines(lambda ranks: shape, config)
    return f"the run takes {lines[0][1]}, besides 1 to 2 GB for the libraries of each rank"


def _train(config: RunConfig, fresh: bool) -> ExitCode:
    from safecl.scan import UploadRefused
    from safecl.training.trainer import Trainer

    try:
        result = Trainer(config, fresh=fresh).fit()
    except UploadRefused as refused:
        if environment.rank() == 0:
            stderr.print(f"safecl: upload refused: {refused}", style="bold red", markup=False)
        return ExitCode.GATE
    if result.stopped:
        end_undisturbed()
        return ExitCode.STOPPED
    return ExitCode.DONE if result.gate is None or result.gate.passed else ExitCode.GATE
