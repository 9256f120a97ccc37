"""`safecl train CFG`: trains in one process, or in several under torchrun or the deepspeed launcher."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from safecl.commands.preflight import preflight
from safecl.config import RunConfig
from safecl.distributed import environment, rank_files
from safecl.exits import ExitCode, end_undisturbed, stderr, tracebacks
from safecl.storage.sizes import memory_limits


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
            if code == ExitCode.STOPPED and "TORCHELASTIC_RUN_ID" in os.environ and rank_files.FILES not in os.environ:
                print(
                    f"torchrun itself ends with 1; the exit code {code} is in {Path(config.output) / EXIT_CODE}",
                    flush=True,
                )
    return code


def memory_needs(config: RunConfig) -> str:
    """Say what `safecl check` predicts for the run, and which settings would fit where it is too much."""
    lines = {label.strip(): text for label, text in _memory_lines(config).items()}
    fits = f"; would fit: {lines['would fit']}" if "would fit" in lines else ""
    return f"the run takes {lines['takes']}, besides 1 to 2 GB for the libraries of each rank{fits}"


def memory_warning(config: RunConfig) -> str | None:
    """Say where a control group or `ulimit -v` leaves less memory than the run takes. The system kills a process that
    goes beyond its control group, and then nobody can say why it has ended."""
    if not (limits := memory_limits()):
        return None
    lines = {label.strip(): text for label, text in _memory_lines(config, with_program=True).items()}
    if "too little" not in lines:
        return None
    fits = f"; would fit: {lines['would fit']}" if "would fit" in lines else ""
    return f"warning: {lines['too little']} ({'; '.join(limits)}), so the system may kill the run{fits}"


def _memory_lines(config: RunConfig, *, with_program: bool = False) -> dict[str, str]:
    from safecl.planning.costs.memory_report import memory_lines, program_bytes
    from safecl.planning.costs.model_shape import ModelShape
    from safecl.planning.costs.shapes import trained_model

    shape = ModelShape.of(trained_model(config), config)
    program = program_bytes() if with_program else 0
    return dict(memory_lines(lambda ranks: shape, config, program=program))


def _train(config: RunConfig, fresh: bool) -> ExitCode:
    from safecl.scan import UploadRefused
    from safecl.training.trainer import Trainer

    try:
        trainer = Trainer(config, fresh=fresh)
        if environment.rank() == 0 and (warning := memory_warning(config)) is not None:
            stderr.print(f"safecl: {warning}", style="yellow")
        result = trainer.fit()
    except UploadRefused as refused:
        if environment.rank() == 0:
            stderr.print(f"safecl: upload refused: {refused}", style="bold red")
        return ExitCode.GATE
    if result.stopped:
        end_undisturbed()
        return ExitCode.STOPPED
    return ExitCode.DONE if result.gate is None or result.gate.passed else ExitCode.GATE
