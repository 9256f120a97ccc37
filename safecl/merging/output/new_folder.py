"""A folder that appears whole or not at all.

    .OUT.partial/    a running merge, or one that was killed: the next one clears it
    OUT              appears by rename when everything in it is on the disk

The process that writes holds a lock on the partial folder, so two merges into one folder do not mix.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from safecl.config import ConfigError
from safecl.storage import durable
from safecl.storage.durable import sync_folder
from safecl.storage.locks import NO_LOCKS
from safecl.storage.sizes import format_bytes, free_bytes

SLACK_BYTES = 64 * 2**20  # tokenizer, card, folder entries


class NewFolder:
    """The folder `path`, while it is being made."""

    def __init__(self, path: Path):
        self.path = path.absolute()
        self.partial = self.path.with_name(f".{self.path.name}.partial")
        self._handle: int | None = None

    def check_free(self) -> None:
        """Raise ConfigError where something is in the folder's place already, or the place cannot be written to."""
        if self.path.is_dir() and not any(self.path.iterdir()):
            return
        if self.path.exists() or self.path.is_symlink():
            raise ConfigError(f"{self.path}: is there already; choose another folder, or remove it")
        nearest = next(parent for parent in self.path.parents if parent.exists())
        if not nearest.is_dir():
            raise ConfigError(f"{nearest}: is a file, so {self.path} cannot be made")
        if not os.access(nearest, os.W_OK):
            raise ConfigError(f"{nearest}: cannot be written to")

    def begin(self, num_bytes: int) -> Path:
        """Make the empty partial folder and return it. Raises ConfigError where the disk has no room for
        `num_bytes`, or another process writes there."""
        if (free := free_bytes(self.path)) < num_bytes + SLACK_BYTES:
            raise ConfigError(f"{self.path}: it takes {format_bytes(num_bytes)} and {format_bytes(free)} are free")
        self.partial.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        for path in self.partial.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        durable.at("partial folder made")
        return self.partial

    def publish(self) -> None:
        """Bring everything to the disk, and give the folder its name. Raises OSError."""
        for path in self.partial.rglob("*"):
            if path.is_dir():
                sync_folder(path)
        sync_folder(self.partial)
        durable.at("before the rename")
        os.rename(self.partial, self.path)  # replaces an empty folder
        durable.at("renamed")
        sync_folder(self.path.parent)
        self._release()

    def abandon(self) -> None:
        """Remove what was written. Does nothing where another process writes there, or the folder is published."""
        if self._handle is None:
            return
        shutil.rmtree(self.partial, ignore_errors=True)
        self._release()

    def _take_lock(self) -> None:
        """Lock the partial folder itself, so that no lock file is left in the result."""
        handle = os.open(self.partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = self.partial.exists() and os.path.samestat(os.fstat(handle), self.partial.stat())
        except BlockingIOError:
            is_ours = False
        except OSError as error:
            is_ours = error.errno in NO_LOCKS
        if not is_ours:
            os.close(handle)
            raise ConfigError(f"{self.path}: another process is merging into it right now; choose another folder")
        self._handle = handle

    def _release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
