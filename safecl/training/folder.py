"""The folder of a run: one process at a time, never another run's files overwritten. Imports no torch.

run.json      which run it is: resolved config, fingerprints of the rows, versions
run.lock      held while a run is under way; the system gives it back when the process ends, however it ends
exit_code     how the last `safecl train` here ended (0, 3 or 75), for launchers that have exit codes of their own; absent while a run is
              under way and after one that failed or was killed
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any

from safecl.config import ConfigError
from safecl.storage.durable import replace_file

IDENTITY, LOCK, RESULTS, EXIT_CODE = "run.json", "run.lock", "results.json", "exit_code"


class RunFolder:
    """A run folder. Every rank looks into it; rank 0 locks and writes."""

    def __init__(self, path: Path):
        self.path = path
        self._lock: int | None = None

    # ------------------------------------------------------------------------------------------------------------- lock

    def lock(self) -> str | None:
        """Takes the folder for this process. Returns a note where the file system cannot lock. Raises ConfigError where
        another has it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(f"output: {self.path}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(handle)
            raise ConfigError(
                f"output: {self.path} is in use by {holder}; wait for that run or stop it, or choose another folder with output=..."
            ) from None
        except OSError as error:
            os.close(handle)
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                raise
            return f"{self.path}: this file system has no locks ({error.strerror}); make sure that no other run writes here"
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._lock = handle
        return None

    def forget_exit_code(self) -> None:
        """Call it with the lock held: what the run before has left is no longer true."""
        (self.path / EXIT_CODE).unlink(missing_ok=True)

    def write_exit_code(self, code: int) -> None:
        replace_file(self.path / EXIT_CODE, f"{code}\n")

    def release(self) -> None:
        """Gives the folder back."""
        if self._lock is not None:
            os.close(self._lock)  # the file stays: removing it would let two processes hold two files of one name
            self._lock = None

    # --------------------------------------------------------------------------------------------------------- contents

    def holdings(self) -> list[str]:
        """What is here that a new run would destroy, in words; empty for a folder that can be begun anew."""
        checkpoints = sorted(self.path.glob("checkpoints/*step-*"))
        found = [f"{len(checkpoints)} checkpoint{'s' * (len(checkpoints) > 1)}"] if checkpoints else []
        return found + [name for name in ("model", "model-live", RESULTS) if (self.path / name).exists()]

    def refuse_to_overwrite(self) -> None:
        """Raises ConfigError where a fresh run would overwrite something."""
        if holdings := self.holdings():
            spare = next(
                name for i in range(1, 10**6) if not (name := self.path.with_name(f"{self.path.name}-{i}")).exists()
            )
            raise ConfigError(
                f"output: {self.path} holds a run already ({', '.join(holdings)}), which --fresh does not overwrite; "
                f"set it aside first (mv {self.path} {spare}), or choose another folder with output=...; "
                "without --fresh the run there goes on"
            )

    def identity(self) -> dict[str, Any] | None:
        """Which run this is, as `write_identity` wrote it; None where nothing readable is there."""
        try:
            return json.loads((self.path / IDENTITY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def write_identity(self, identity: dict[str, Any]) -> None:
        replace_file(self.path / IDENTITY, json.dumps(identity, indent=1))

    def results(self) -> dict[str, Any] | None:
        """results.json of a run that is finished, else None."""
        try:
            return json.loads((self.path / RESULTS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
