"""The bytes of a data file, unpacked where it is compressed, and the raw row that readers make of them."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from safecl.data.messages import MAX_ROW_CHARS, DataError, clip

_BLOCK = 2**20
PACKED = (".gz", ".bz2", ".xz", ".zst")
_STARTS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class RawRow:
    """One row: its `columns`, or the `problem` that makes it unreadable. `line` counts from 1: see `unit_of`."""

    line: int
    columns: dict[str, Any] | None
    problem: str | None = None


def suffix_of(local: Path) -> str:
    """The suffix that tells the format, in lower case: that before `.gz` or the like where a file is compressed."""
    suffix = local.suffix.lower()
    return Path(local.stem).suffix.lower() if suffix in PACKED else suffix


def packing_of(local: Path) -> str | None:
    """Return the compression of the file, read from its first bytes; None where it has none."""
    with local.open("rb") as file:
        start = file.read(6)
    return next((name for magic, name in _STARTS.items() if start.startswith(magic)), None)


@contextmanager
def open_bytes(path: str, local: Path) -> Iterator[BinaryIO]:
    """Open a file and unpack it on the way. Raises DataError where it is compressed and broken."""
    packing = packing_of(local)
    if packing is None:
        with local.open("rb") as file:
            yield file
        return
    try:
        with _unpacking(local, packing) as file:
            yield file
    except (OSError, EOFError, lzma.LZMAError) as error:
        reason = clip(str(error) or type(error).__name__, 80)
        raise DataError(f"{path}: not a whole {packing} file: {reason}") from None


def _unpacking(local: Path, packing: str) -> BinaryIO:
    if packing == "zstd":
        import io

        import pyarrow

        return cast(BinaryIO, io.BufferedReader(cast(Any, pyarrow.CompressedInputStream(str(local), "zstd"))))
    openers: dict[str, Any] = {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}
    return cast(BinaryIO, openers[packing](local, "rb"))


def lines_of(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Yield (number, line without its end) of each line that is not empty; None for a line longer than the limit."""
    limit = 4 * MAX_ROW_CHARS  # a character has up to 4 bytes
    number = 0
    while raw := file.readline(limit):
        number += 1
        if len(raw) == limit and not raw.endswith(b"\n"):
            while (rest := file.readline(_BLOCK)) and not rest.endswith(b"\n"):
                pass
            yield number, None
            continue
        raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        if raw.strip():
            yield number, raw.rstrip(b"\r\n")
