"""Temporary folders that do not outlive their process for long: the next one sweeps what killed processes have left.

A folder belongs to the process that holds the lock on its file `.owner`. The system releases the lock however the
process ends, and locks are seen from other containers too, where process numbers mean nothing. Imports no torch.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import weakref
from pathlib import Path

from safecl.storage.locks import FileLock

_OWNER = ".owner"


def temporary_folder(what: str, owner: object) -> Path:
    """Make an empty folder that is removed with the object `owner`, or at the end of this process."""
    prefix = f"safecl-{what}-"
    _sweep(prefix)
    made = Path(tempfile.mkdtemp(prefix=f".{prefix}"))
    lock = FileLock(made / _OWNER)
    lock.take()
    folder = made.rename(made.with_name(made.name[1:]))  # others sweep only what has this name, so what has its lock
    weakref.finalize(owner, _remove, folder, lock)
    inner = folder / what
    inner.mkdir()
    return inner


def _remove(folder: Path, lock: FileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.close()


def _sweep(prefix: str) -> None:
    """Remove the folders whose process has ended. One that another user made, or that is just being made, stays."""
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        if not (folder / _OWNER).is_file() or folder.is_symlink():
            continue
        with contextlib.suppress(OSError):
            lock = FileLock(folder / _OWNER)
            if lock.take() and lock.unsupported is None:
                shutil.rmtree(folder, ignore_errors=True)
            lock.close()
