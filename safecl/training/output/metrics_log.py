"""metrics.jsonl, one line per step, and the trackers that the config names. Rank 0 only."""

from __future__ import annotations

import contextlib
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

from safecl.config import RunConfig
from safecl.config.secrets import without_secrets
from safecl.distributed import devices
from safecl.planning.plans import TaskPlan
from safecl.storage.durable import replace_file
from safecl.training.run import Run


class MetricsLog:
    """Appends dicts as JSON lines, and passes their numbers to the trackers. Without a folder, as on ranks above 0, it
    does nothing."""

    def __init__(self, folder: Path | None, config: RunConfig, earlier: bytes = b"", step: int = 0):
        """earlier: the lines up to the checkpoint that a run is resumed from; later ones are written again. step: the
        next step."""
        self._file: TextIO | None = None
        self._trackers: list[Tracker] = []
        if folder is not None:
            replace_file(folder / "metrics.jsonl", earlier.decode())
            self._file = (folder / "metrics.jsonl").open("a+", encoding="utf-8")
            settings = without_secrets(config.model_dump(mode="json"))
            self._trackers = [_TRACKERS[name](folder, folder.name, settings, step) for name in config.log.report_to]

    def so_far(self) -> bytes:
        """Return all lines until now."""
        if self._file is None:
            return b""
        self._file.seek(0)
        return self._file.read().encode()

    def write(self, values: dict[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from None
        numbers = {
            key: value
            for key, value in values.items()
            if isinstance(value, (int, float)) and key not in ("step", "time")
        }
        for log in self._trackers:
            log(numbers, values["step"])

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk, which `write` has reported
                self._file.close()


def step_values(run: Run, task: TaskPlan, totals: dict[str, float], seconds: float) -> dict[str, Any]:
    """Return a step's line in metrics.jsonl. totals: see StepLosses.totals, without `stop`. seconds: time of the
    step. Its `time` is the wall clock at its end, in seconds since 1970."""
    result = run.engine.optimizer.result
    tokens, penalty = int(totals["tokens"]), totals["penalty"]
    losses = {term: value for term, value in totals.items() if term not in ("tokens", "penalty")}
    values: dict[str, Any] = {"step": run.global_step - 1, "task": task.config.name}
    values |= {f"loss/{term}": value for term, value in losses.items()}
    if result.penalty is not None:
        values["loss/penalty"] = penalty
    values["grad_norm"] = float(result.grad_norm) if result.grad_norm is not None else None
    values["learning_rate"] = run.last_learning_rate
    values["tokens"] = tokens
    values["tokens_per_second"] = round(tokens / seconds, 1)
    values["memory_bytes"] = _peak_memory()
    values["skipped_steps"] = run.skipped_steps
    values["time"] = round(time.time(), 3)
    return values


def _peak_memory() -> int:
    """Bytes of the peak since the start: allocated on the GPU, or resident in this process on the CPU."""
    if devices.on_gpu():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ------------------------------------------------------------------------------------------------------------ trackers

Tracker = Callable[[dict[str, Any], int], None]
"""Logs numbers by name, and their step."""


def _tensorboard(folder: Path, run_name: str, config: dict[str, Any], step: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard", purge_step=step)

    def log(values: dict[str, Any], step: int) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return log


def _wandb(folder: Path, run_name: str, config: dict[str, Any], step: int) -> Tracker:
    import wandb

    wandb.init(project="safecl", name=run_name, config=config, dir=str(folder))

    def log(values: dict[str, Any], step: int) -> None:
        wandb.log(values, step=step)

    return log


def _trackio(folder: Path, run_name: str, config: dict[str, Any], step: int) -> Tracker:
    import trackio

    trackio.init(project="safecl", name=run_name, config=config)

    def log(values: dict[str, Any], step: int) -> None:
        trackio.log(values)

    return log


_TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
