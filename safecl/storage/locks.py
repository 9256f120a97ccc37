"""Locks on files: one process at a time. The system releases a lock when its process ends, however it ends.

A lock file is never removed: otherwise two processes could lock two files of one name. Imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""The errors of file systems that have no locks."""
RESULTS_LOCK = "results.lock"
"""The lock in a folder of results, for verbs that read what is there, add to it and write it again."""


class FileLock:
    """An exclusive lock on a file, which is made where it is missing. Raises OSError where it cannot be opened."""

    def __init__(self, path: Path):
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.unsupported: str | None = None
        """Why there is no lock though `take` returned True: the file system has none."""

    def take(self) -> bool:
        """Take the lock without waiting. Return False where another process holds it.

        Return True also where the file system has no locks; `unsupported` then says why. Raises other OSErrors.
        """
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            self.unsupported = error.strerror
        return True

    def sign(self) -> None:
        """Write into the file who holds the lock."""
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def holder(self) -> str:
        """Name the process that has signed the file."""
        return os.pread(self._handle, 200, 0).decode(errors="replace").strip() or "another process"

    def close(self) -> None:
        """Release the lock."""
        os.close(self._handle)


@contextlib.contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Hold the lock on a file for the `with` block; wait as long as another process holds it. Raises OSError.

    On a file system that has no locks the block runs without one.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield
