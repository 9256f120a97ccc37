"""The index files of a buffer, and the reading of a folder when a buffer is opened.

    folder/rows-FIRST-LAST-GENERATION-NUMBER.segment   rows, append-only            (segments.py)
    folder/index-VERSION.index                         which rows are held, where   (table.py)
    folder/writer.lock                                 who writes                   (lock.py)

An index is written under another name and renamed when it is on disk. The last two are kept. Rows that were appended
after the last index are found by reading the segments from where it stops.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from safecl.replay.files.codec import ENTRY_COLUMNS
from safecl.replay.files.hashing import shard_of
from safecl.replay.files.segments import HEADER_BYTES
from safecl.replay.files.store import Found, SegmentFolder, newest
from safecl.replay.files.table import COLUMNS, RowTable, load_index
from safecl.replay.rows import ReplayError
from safecl.storage.durable import sync_folder

KEPT_INDICES = 2

Blocks = list[tuple[Found, list[np.ndarray]]]
"""Blocks found by reading segments, each with a mask [rows] of the rows that count."""


@dataclass
class Opened:
    """Contents of a folder. header: None without a readable index. found: rows beyond the index. problems: damage, in
    words."""

    header: dict[str, Any] | None = None
    table: RowTable = field(default_factory=RowTable)
    found: Blocks = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def index_files(folder: Path) -> list[Path]:
    """Return the index files, the newest first."""
    return sorted(folder.glob("index-*.index"), reverse=True) if folder.is_dir() else []


def version_of(path: Path) -> int:
    """Return the version in an index file's name."""
    return int(path.stem.split("-")[1])


def map_file(path: Path) -> memoryview:
    """Map a file into memory."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def write_index(folder: Path, version: int, data: bytes) -> None:
    """Publish an index and remove those older than the last two. Raises ReplayError with the old ones intact."""
    path, temporary = folder / f"index-{version:010d}.index", folder / f"index-{version:010d}.writing"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        sync_folder(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ReplayError(
            f"{path}: {error.strerror} while writing {len(data):,} bytes; the index before it is intact"
        ) from None
    for old in index_files(folder)[KEPT_INDICES:]:
        old.unlink(missing_ok=True)


def read_newest_index(folder: Path) -> Opened:
    """Read the newest index that is whole; `problems` names damaged ones."""
    opened = Opened()
    for path in index_files(folder):
        try:
            opened.header, opened.table = load_index(map_file(path), str(path))
            return opened
        except ReplayError as error:
            opened.problems.append(str(error))
        except FileNotFoundError:
            continue  # a writer has published a newer one meanwhile
    return opened


def open_folder(store: SegmentFolder) -> Opened:
    """Read the newest index, and find the rows that were appended after it."""
    opened = read_newest_index(store.folder)
    covered = {name: size for name, size, _ in opened.header["segments"]} if opened.header else {}
    ignored = opened.header["ignored"] if opened.header else []
    opened.found, problems = find_blocks(store, [name for name in store.on_disk() if name not in ignored], covered)
    opened.problems += problems
    return opened


def find_blocks(
    store: SegmentFolder, names: list[str], covered: dict[str, int], check_bodies: bool = True
) -> tuple[Blocks, list[str]]:
    """Find the blocks of segments beyond the `covered` bytes, and the damage there."""
    found, problems = [], []
    for name in names:
        try:
            size, start = (store.folder / name).stat().st_size, covered.get(name, HEADER_BYTES)
            if size > start:
                found.append(Found(name, store.header(name), store.scan(name, start, check_bodies)))
        except ReplayError as error:
            problems.append(str(error))
    return newest(found), problems + [problem for one in found for problem in one.scan.problems]


def rows_found(
    found: Blocks, store: SegmentFolder, labels: LabelBook, seed: int, first: int = 0
) -> tuple[RowTable, int]:
    """Return the rows of blocks from position `first` on as a table, and the number of rows seen after them."""
    parts: list[dict[str, np.ndarray]] = []
    seen = first
    for one, masks in found:
        for block, mask in zip(one.scan.blocks, masks, strict=True):
            mask = mask & (block.entries["position"] >= first)
            if mask.any():
                seen = max(seen, block.seen)
                parts.append(
                    columns_of(
                        block.entries[mask],
                        block.offsets[mask],
                        store.number(one.name),
                        labels.numbers(block.labels),
                        seed,
                    )
                )
    if not parts:
        return RowTable(), seen
    joined = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}
    # a row that was copied out of a sparse segment is found twice; the last copy counts
    _, last = np.unique(joined["position"][::-1], return_index=True)
    return RowTable({name: column[::-1][last] for name, column in joined.items()}), seen


def columns_of(
    entries: np.ndarray, offsets: np.ndarray, segment: int, labels: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    """Make table columns from a segment's entries. labels: the number of each of the block's labels."""
    columns = {name: entries[name].astype(COLUMNS[name]) for name in COLUMNS if name in ENTRY_COLUMNS}
    columns["label"] = labels[entries["label"]].astype(np.uint32)
    columns["offset"] = offsets.astype(np.uint64)
    columns["segment"] = np.full(len(entries), segment, np.int32)
    columns["shard"] = shard_of(entries["position"], seed)
    for name in ("score", "first_score"):
        columns[name] = np.full(len(entries), np.nan, np.float32)
    return columns


class LabelBook:
    """Numbers the labels (source, task, category), which thousands of rows share."""

    def __init__(self, labels: list[list[str]] | None = None):
        self.labels: list[tuple[str, str, str]] = []
        self._numbers: dict[tuple[str, str, str], int] = {}
        self.numbers(labels or [])

    def number(self, label: tuple[str, str, str]) -> int:
        if label not in self._numbers:
            self._numbers[label] = len(self.labels)
            self.labels.append(label)
        return self._numbers[label]

    def numbers(self, labels: list[list[str]]) -> np.ndarray:
        """Return the numbers of a block's own labels; int64 [labels]."""
        return np.array([self.number((source, task, category)) for source, task, category in labels], np.int64)

    def __getitem__(self, number: int) -> tuple[str, str, str]:
        return self.labels[number]

    @property
    def groups(self) -> list[str]:
        """The category of each label."""
        return [group for _, _, group in self.labels]
