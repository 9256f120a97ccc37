"""Files that are whole or absent: written once, hashed while they are written, and on the disk before anything names
them. Imports no torch, and numpy only for arrays: verbs that refuse a config load neither."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import xxhash

if TYPE_CHECKING:
    import numpy as np

BLOCK_BYTES = 16 * 2**20

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

at: Callable[[str], None] = lambda point: None  # noqa: E731
"""Called with a label at each point of a save where a dying process leaves another state; tests replace it."""


class DamagedCheckpoint(ValueError):
    """A file or checkpoint that must not be loaded. The message names the file and what is wrong with it."""


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and XXH3-128 of a file."""

    size: int
    xxh3_128: str


def sync_folder(folder: Path) -> None:
    """Bring the folder's entries (new names, renames) to the disk: after a power cut no name is there without its
    file."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, parts: Iterable[bytes | memoryview], label: str | None = None) -> FileRecord:
    """Write a new file from its parts and return when it is on the disk. Raises OSError."""
    label, digest, size = label or path.name, xxhash.xxh3_128(), 0
    with path.open("xb", buffering=0) as file:
        at(f"{label}: created")
        for part in parts:
            view = memoryview(part).cast("B")
            for start in range(0, len(view), BLOCK_BYTES):
                block = view[start : start + BLOCK_BYTES]
                digest.update(block)
                _write_all(file, block)
            size += len(view)
            at(f"{label}: partly written")
        os.fsync(file.fileno())
    at(f"{label}: written")
    return FileRecord(size, digest.hexdigest())


def _write_all(file: FileIO, block: memoryview) -> None:
    while len(block):
        block = block[file.write(block) :]


def replace_file(path: Path, content: str | bytes) -> None:
    """Replace a small file so that a reader sees the old or the new one, also after a power cut."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    write_file(partial, [content.encode() if isinstance(content, str) else content], label=path.name)
    os.replace(partial, path)
    sync_folder(path.parent)


def open_regular(path: Path) -> FileIO:
    """Open a plain file for reading, unbuffered. Raises DamagedCheckpoint for a link, a folder, or a missing file."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise DamagedCheckpoint(f"{path}: not a plain file")
    return os.fdopen(handle, "rb", buffering=0)


def read_file(path: Path, max_bytes: int) -> bytes:
    """Read a plain file of at most `max_bytes`. Raises DamagedCheckpoint where it is longer or cannot be opened."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise DamagedCheckpoint(f"{path}: {size:,} bytes long, {max_bytes:,} at most are expected")
        return file.read()


def read_into(file: BinaryIO, position: int, target: memoryview) -> None:
    """Fill `target` (bytes) with the file's bytes from `position` on. Raises DamagedCheckpoint where the file ends
    too early."""
    while len(target):
        count = os.preadv(file.fileno(), [target[:BLOCK_BYTES]], position)
        if count == 0:
            raise DamagedCheckpoint(f"{file.name}: ends at byte {position:,}")
        target, position = target[count:], position + count


def record_of(path: Path) -> FileRecord:
    """Size and XXH3-128 of a plain file. Raises DamagedCheckpoint where it cannot be opened."""
    digest = hash_file(path)
    return FileRecord(path.stat().st_size, digest)


def hash_file(path: Path, *, from_disk: bool = False) -> str:
    """XXH3-128 of a plain file. With `from_disk` the system's copy in memory is dropped first, so that the disk is
    read."""
    digest, block = xxhash.xxh3_128(), bytearray(BLOCK_BYTES)
    with open_regular(path) as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------------------- arrays


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Replace an .npz file so that a reader sees the old or the new one. Makes its folder. Raises OSError."""
    import numpy as np

    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy has an option of its own, which no array is named after
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, file.getvalue())


def read_arrays(path: Path, names: Collection[str]) -> dict[str, Array]:
    """Read these arrays of a file that `write_arrays` wrote. Raises DamagedCheckpoint where the file is missing, cut,
    flipped, or lacks an array."""
    import numpy as np

    with open_regular(path) as file, _unreadable(path):
        with zipfile.ZipFile(file) as parts:
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist()):
                raise DamagedCheckpoint(f"{path}: holds compressed arrays")
        file.seek(0)
        with np.load(file, allow_pickle=False) as found:
            return {name: found[name] for name in names}


def map_array(path: Path) -> Array:
    """Map an .npy file. Raises DamagedCheckpoint where it is missing, cut, or has another header."""
    import numpy as np

    with _unreadable(path):
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(found, np.ndarray):  # the archive of another format
        found.close()
        raise DamagedCheckpoint(f"{path}: not an array")
    return found


@contextlib.contextmanager
def _unreadable(path: Path) -> Iterator[None]:
    """Raise DamagedCheckpoint for every error inside. On foreign bytes zipfile and numpy raise BadZipFile, EOFError,
    NotImplementedError, TokenError, MemoryError and more."""
    try:
        yield
    except DamagedCheckpoint:
        raise
    except Exception as error:
        raise DamagedCheckpoint(f"{path}: cannot be read: {type(error).__name__}: {error}") from None
