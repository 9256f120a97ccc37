"""One writer per shard: locks on byte ranges of one file, which the system releases when the process dies.

Byte s of the lock file's locked region stands for shard s, so ranks can write at the same time, and no shard has two
writers. The locks are Linux's open-file-description locks (fcntl(2)), which also exclude a second writer in the same
process.
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
    """Another process writes to the same shards. The message names the process."""


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
            hint = "wait for it to end, or open the memory read-only, or use another folder"
            raise BufferInUse(f"{folder}: {writer} is writing to this memory; {hint}") from None
        note = f"process {os.getpid()} on {socket.gethostname()}".encode()[:_NOTE_BYTES].ljust(_NOTE_BYTES)
        for group in range(first // SHARDS_PER_GROUP, last // SHARDS_PER_GROUP + 1):
            with contextlib.suppress(OSError):  # a full disk must not prevent opening the memory
                os.pwrite(self._file.fileno(), note, group * _NOTE_BYTES)

    def _note(self, first: int, last: int) -> str:
        groups = range(first // SHARDS_PER_GROUP, min(last // SHARDS_PER_GROUP + 1, NUM_GROUPS))
        notes = {
            os.pread(self._file.fileno(), _NOTE_BYTES, group * _NOTE_BYTES).decode(errors="replace").strip("\0 ")
            for group in groups
        }
        return " or ".join(sorted(note for note in notes if note)) or "another process"

    def close(self) -> None:
        """Release the shards."""
        self._file.close()
