"""Preflight on the ranks of the pool, each of which takes itself for a host."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from unittest import mock

from safecl.config import ConfigError, RunConfig
from safecl.distributed import collectives
from safecl.launching import facts, preflight
from safecl.storage.locks import FileLock


def check(folder: str, **changes: object) -> tuple[list[str], RunConfig]:
    """What is said on this rank, and the config afterwards."""
    rank, said = collectives.rank(), []
    output = Path(folder) / "run"
    tree = {"model": {"path": "m"}, "tasks": [{"name": "a", "train": "t"}], "output": str(output)}
    config = RunConfig.model_validate(tree | changes)
    host = f"host-{rank}"
    with (
        mock.patch.object(socket, "gethostname", lambda: host),
        mock.patch.object(facts, "node_identity", lambda: (host,)),
        mock.patch.object(preflight, "SECONDS_FOR_A_FILE", 0.3),
        mock.patch.object(preflight, "MESSAGE_BYTES", 2**20),
        mock.patch.dict(os.environ, {"SAFECL_CACHE": str(Path(folder) / host)}),
    ):
        rows = {"task a": "0"}
        note = said.append if rank == 0 else lambda _: None
        config = preflight.check_ranks(config, rows, [], {"safecl": "1"}, note, "run.lock")
    return said, config


def locked(folder: str) -> FileLock | None:
    """Hold the run's lock on rank 0, as a run does."""
    output = Path(folder) / "run"
    output.mkdir(exist_ok=True, parents=True)
    lock = FileLock(output / "run.lock") if collectives.rank() == 0 else None
    if lock is not None:
        assert lock.take()
    collectives.barrier()
    return lock


def agree(folder: str) -> list[str]:
    lock = locked(folder)
    try:
        return check(folder)[0]
    finally:
        if lock is not None:
            lock.close()


def without_locks(folder: str) -> list[str]:
    return check(folder)[0]


def artifacts_of(folder: str) -> str | None:
    return check(folder)[1].artifacts.folder


def differ(folder: str) -> str:
    return _message(folder, train={"seed": collectives.rank()})


def not_shared(folder: str) -> str:
    """Rank 1 sees another folder under the same path."""
    real = Path.read_text

    def read_text(self: Path, *args: object, **kwargs: object) -> str:
        if self.name.startswith(".preflight") and collectives.rank() == 1:
            raise FileNotFoundError(self)
        return real(self, *args, **kwargs)

    with mock.patch.object(Path, "read_text", read_text):
        return _message(folder)


def _message(folder: str, **changes: object) -> str:
    try:
        check(folder, **changes)
    except ConfigError as error:
        return str(error)
    return "nothing"
