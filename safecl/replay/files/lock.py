"""One writer per shard: locks on byte ranges of one file, given back by the system when their process dies, however it
dies.

Byte s of the lock file's locked region stands for shard s, so ranks write side by side and two writers of one shard
cannot be. The locks are Linux's open-file-description locks (fcntl(2)), which also tell two openings inside one process
apart.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from pathlib import Path

from safecl.config import ConfigError
from safecl.replay.files.hashing import NUM_GROUPS, SHARDS_PER_GROUP

_NAME = "writer.lock"
_NOTE_BYTES = 64  # who writes: one note per group of shards, for the message
_LOCKED = 1 << 20  # the locked bytes lie beyond the notes


class BufferInUse(ConfigError):
    """Another process writes to the same shards. The message names it."""


class WriterLock:
    """Holds the shards `first` to `last`, both included, of a folder for writing. Raises BufferInUse."""

    def __init__(self, folder: Path, first: int, last: int):
        self.path = folder / _NAME
        self._file = open(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o644), "r+b", buffering=0)
        region = struct.pack("@hhqqi", fcntl.F_WRLCK, os.SEEK_SET, _LOCKED + first, last - first + 1, 0)
        try:
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, region)
        except (BlockingIOError, PermissionError):
            writer = self._note(first, last)
            self._file.close()
            raise BufferInUse(
                f"{folder}: {writer} is writing to this memory; wait for it to end, or open the memory read-only, or use another folder"
            ) from None
        note = f"process {os.getpid()} on {socket.gethostname()}".encode()[:_NOTE_BYTES].ljust(_NOTE_BYTES)
        for group in range(first // SHARDS_PER_GROUP, last // SHARDS_PER_GROUP + 1):
            with contextlib.suppress(OSError):  # a full disk must not keep anyone from opening what is there
                os.pwrite(self._file.fileno(), note, group * _NOTE_BYTES)

    def _note(self, first: int, last: int) -> str:
        groups = range(first // SHARDS_PER_GROUP, min(last // SHARDS_PER_GROUP + 1, NUM_GROUPS))
        notes = {
            os.pread(self._file.fileno(), _NOTE_BYTES, group * _NOTE_BYTES).decode(errors="replace").strip("\0 ")
            for group in groups
        }
        return " or ".join(sorted(note for note in notes if note)) or "another process"

    def close(self) -> None:
        """Gives the shards back."""
        self._file.close()
