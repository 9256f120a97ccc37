"""metrics.jsonl, one line per step, and further trackers where the config names them. Rank 0 only."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from safecl.config import ConfigError, RunConfig
from safecl.storage.durable import replace_file


class MetricsLog:
    """Appends dicts as JSON lines and passes numbers on to the configured trackers. Without a folder (ranks above 0) it
    does nothing.

    `earlier` is what a resumed run has written until its checkpoint, `step` the next step; lines after that are written
    anew.
    """

    def __init__(self, folder: Path | None, config: RunConfig, earlier: bytes = b"", step: int = 0):
        self._file = None
        if folder is not None:
            replace_file(folder / "metrics.jsonl", earlier.decode())
            self._file = (folder / "metrics.jsonl").open("a+", encoding="utf-8")
        names = config.log.report_to if folder is not None else []
        self._trackers = [_TRACKERS[name](folder, folder.name, config.model_dump(mode="json"), step) for name in names]

    def so_far(self) -> bytes:
        """All lines until now."""
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
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float)) and key != "step"}
        for log in self._trackers:
            log(numbers, values["step"])

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # of a full disk, which has been told
                self._file.close()


def _tensorboard(folder: Path, run_name: str, config: dict[str, Any], step: int):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard", purge_step=step)
    return lambda values, step: [writer.add_scalar(key, value, step) for key, value in values.items()]


def _wandb(folder: Path, run_name: str, config: dict[str, Any], step: int):
    import wandb

    wandb.init(project="safecl", name=run_name, config=config, dir=str(folder))
    return lambda values, step: wandb.log(values, step=step)


def _trackio(folder: Path, run_name: str, config: dict[str, Any], step: int):
    import trackio

    trackio.init(project="safecl", name=run_name, config=config)
    return lambda values, step: trackio.log(values)


_TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}


def check_trackers(names: list[str]) -> None:
    """Raises ConfigError for a tracker that is not installed."""
    from importlib.util import find_spec

    for name in names:
        if find_spec(name) is None:
            raise ConfigError(f"log.report_to: {name} is not installed; pip install 'safecl[track]' or leave it out")
