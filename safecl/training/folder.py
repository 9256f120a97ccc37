"""The folder of a run: one process at a time uses it, and no other run's files are overwritten. Imports no torch.

run.json    the identity of the run: resolved config, fingerprints of the rows, versions
run.lock    locked while a run uses the folder; the system unlocks it when the process ends, however it ends
exit_code   how the last `safecl train` here ended (0, 3 or 75), for launchers that have exit codes of their own; absent
            during a run, and after one that failed or was killed
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safecl.config import ConfigError
from safecl.storage.durable import replace_file
from safecl.storage.locks import FileLock
from safecl.storage.model_folder import FAILED_MODEL, LIVE_MODEL, RUN_MODEL

IDENTITY, LOCK, RESULTS, EXIT_CODE = "run.json", "run.lock", "results.json", "exit_code"


class RunFolder:
    """A run folder. Every rank reads it; rank 0 locks it and writes."""

    def __init__(self, path: Path):
        self.path = path
        self._lock: FileLock | None = None
        self._inode: tuple[int, int] | None = None

    # ------------------------------------------------------------------------------------------------------------- lock

    def lock(self) -> str | None:
        """Lock the folder for this process. Returns a note where the file system has no locks. Raises ConfigError where
        another process holds it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / LOCK)
        except OSError as error:
            raise ConfigError(f"output: {self.path}: cannot be written: {error.strerror}") from None
        if not lock.take():
            holder = lock.holder()
            lock.close()
            raise self._in_use(holder)
        if lock.unsupported is not None:
            lock.close()
            return (
                f"{self.path}: this file system has no locks ({lock.unsupported}); "
                "make sure that no other run writes here"
            )
        lock.sign()
        self._lock = lock
        return None

    def refuse_where_in_use(self, host: str | None = None) -> None:
        """Raise ConfigError where a process uses the folder. host: only where it runs on this one."""
        if not (self.path / LOCK).exists():
            return
        with contextlib.suppress(OSError):  # `lock` reports it
            lock = FileLock(self.path / LOCK)
            try:
                if not lock.take() and (host is None or lock.holder().endswith(f" on {host}")):
                    raise self._in_use(lock.holder())
            finally:
                lock.close()

    def _in_use(self, holder: str) -> ConfigError:
        return ConfigError(
            f"output: {self.path} is in use by {holder}; wait for that run or stop it, or choose another folder "
            "with output=..."
        )

    def remember(self) -> None:
        """Remember which folder this is, for `has_vanished`."""
        self._inode = self._inode_now()

    def has_vanished(self) -> bool:
        """Return whether the folder was removed, moved or replaced since `remember`. False where it cannot be told."""
        try:
            return self._inode is not None and self._inode_now() != self._inode
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:  # a file system that does not answer; what is written next says so
            return False

    def describe_loss(self) -> str:
        """Say what has happened to a folder that has vanished, and what helps."""
        return (
            f"the run folder {self.path} has vanished: it was removed, moved or replaced while the run was under way. "
            "Nothing is saved any more; put it back and the same command resumes from its last checkpoint, or starts "
            "from the beginning where it is lost"
        )

    def _inode_now(self) -> tuple[int, int]:
        status = os.stat(self.path)
        return status.st_dev, status.st_ino

    def forget_exit_code(self) -> None:
        """Remove the exit code of the run before. Call it with the lock held."""
        (self.path / EXIT_CODE).unlink(missing_ok=True)

    def write_exit_code(self, code: int) -> None:
        replace_file(self.path / EXIT_CODE, f"{code}\n")

    def release(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # --------------------------------------------------------------------------------------------------------- contents

    def holdings(self) -> list[str]:
        """Return what a new run would overwrite; empty where a new run can begin."""
        checkpoints = sorted(self.path.glob("checkpoints/*step-*"))
        found = [f"{len(checkpoints)} checkpoint{'s' * (len(checkpoints) > 1)}"] if checkpoints else []
        return found + [name for name in (RUN_MODEL, FAILED_MODEL, LIVE_MODEL, RESULTS) if (self.path / name).exists()]

    def refuse_to_overwrite(self) -> None:
        """Raise ConfigError where a new run would overwrite something."""
        if holdings := self.holdings():
            spare = next(
                name for i in range(1, 10**6) if not (name := self.path.with_name(f"{self.path.name}-{i}")).exists()
            )
            raise ConfigError(
                f"output: {self.path} holds a run already ({', '.join(holdings)}), which --fresh does not overwrite; "
                f"set it aside first (mv {self.path} {spare}), or choose another folder with output=...; "
                "without --fresh that run resumes"
            )

    def identity(self) -> dict[str, Any] | None:
        """Return what `write_identity` wrote; None where it cannot be read."""
        try:
            return json.loads((self.path / IDENTITY).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None

    def write_identity(self, identity: dict[str, Any]) -> None:
        """Write run.json. Raises ConfigError where the folder cannot be written."""
        self._write(IDENTITY, json.dumps(identity, indent=1), replace_file)

    def write_text(self, name: str, text: str) -> None:
        """Write a file of the folder. Raises ConfigError where the folder cannot be written."""
        self._write(name, text, lambda path, text: path.write_text(text, encoding="utf-8"))

    def _write(self, name: str, text: str, write: Callable[[Path, str], object]) -> None:
        try:
            write(self.path / name, text)
        except OSError as error:
            raise ConfigError(f"output: {self.path}: cannot be written: {error.strerror}") from None

    def results(self) -> dict[str, Any] | None:
        """Return results.json of a finished run; None where the run is not finished."""
        try:
            return json.loads((self.path / RESULTS).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None

    def write_results(self, results: dict[str, Any]) -> None:
        """Write results.json, whole or not at all: it marks the run as finished."""
        replace_file(self.path / RESULTS, json.dumps(results, indent=2))
