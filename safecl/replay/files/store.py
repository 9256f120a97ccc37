"""A folder of segments: write into one, map all, and find rows that a dead process left."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from safecl.replay.files.hashing import NUM_SHARDS
from safecl.replay.files.lock import WriterLock
from safecl.replay.files.segments import HEADER_BYTES, Scan, SegmentHeader, SegmentWriter, read_header, scan
from safecl.replay.rows import ReplayError
from safecl.storage.durable import sync_folder

SEGMENT_BYTES = 256 * 2**20

ROWS, CACHE = 0, 1


def shards_of_rank(rank: int, world_size: int) -> tuple[int, int]:
    """Return the first and last shard of a rank, both included: those with shard * world_size // 1024 == rank."""
    if not 0 <= rank < world_size <= NUM_SHARDS:
        limits = f"ranks run from 0 to world_size - 1, and at most {NUM_SHARDS} can share a memory"
        raise ValueError(f"rank {rank} of {world_size}: {limits}")
    return -(-rank * NUM_SHARDS // world_size), -(-(rank + 1) * NUM_SHARDS // world_size) - 1


@dataclass
class Found:
    """Rows found by reading a segment, because the index does not list them."""

    name: str
    header: SegmentHeader
    scan: Scan


class SegmentFolder:
    """Segments of one kind in a folder. A writer holds the lock of its shards; readers hold none and see what is on
    disk.

    Segments are named by file name; `number(name)` gives the small int by which an index refers to one.
    """

    def __init__(
        self,
        folder: Path,
        kind: int,
        identity: int,
        shards: tuple[int, int] = (0, NUM_SHARDS - 1),
        writable: bool = True,
    ):
        self.folder, self.kind, self.identity, self.shards, self.writable = folder, kind, identity, shards, writable
        if writable:
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = WriterLock(folder, *shards) if writable else None
        self._names: list[str] = []
        self._numbers: dict[str, int] = {}
        self._maps: dict[str, memoryview] = {}
        self._digests: dict[str, tuple[int, str]] = {}
        self._writer: SegmentWriter | None = None
        self._generation: int | None = None
        self._next_number = 0
        self.start = 0

    # ----------------------------------------------------------------------------------------------------------- naming

    def on_disk(self) -> list[str]:
        """Return the names of the segments in the folder, sorted."""
        prefix = ("rows-", "cache-")[self.kind]
        return sorted(p.name for p in self.folder.glob(f"{prefix}*.segment")) if self.folder.is_dir() else []

    def number(self, name: str) -> int:
        """Return the int that stands for a segment in this process."""
        if name not in self._numbers:
            self._numbers[name] = len(self._names)
            self._names.append(name)
        return self._numbers[name]

    def name(self, number: int) -> str:
        """Return the file name that an int stands for."""
        return self._names[number]

    @property
    def num_names(self) -> int:
        """Number of segments that have an int."""
        return len(self._names)

    def header(self, name: str) -> SegmentHeader:
        """Read a segment's header. Raises ReplayError where it is damaged or belongs to another memory."""
        header = read_header(self.folder / name)
        if header.identity != self.identity or header.kind != self.kind:
            raise ReplayError(
                f"{self.folder / name}: belongs to another memory (seed or teacher differ); move it out of this folder"
            )
        return header

    # ---------------------------------------------------------------------------------------------------------- reading

    def view(self, name: str, end: int) -> memoryview:
        """Map a file, at least up to byte `end`. Raises ReplayError where it is missing or shorter."""
        view = self._maps.get(name)
        if view is None or len(view) < end:
            view = self._maps[name] = self._map(name)
        if len(view) < end:
            raise ReplayError(f"{self.folder / name}: {len(view):,} bytes long, {end:,} were written; the file was cut")
        return view

    def _map(self, name: str) -> memoryview:
        try:
            with (self.folder / name).open("rb") as file:
                if os.fstat(file.fileno()).st_size == 0:
                    return memoryview(b"")
                return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except FileNotFoundError:
            raise ReplayError(f"{self.folder / name}: the segment is missing") from None

    def read(self, number: int, offset: int, nbytes: int) -> memoryview:
        """Return bytes of a segment, a view of the mapped file."""
        return self.view(self._names[number], offset + nbytes)[offset : offset + nbytes]

    def scan(self, name: str, start: int = HEADER_BYTES, check_bodies: bool = True) -> Scan:
        """Find the blocks of a segment from byte `start` on."""
        self._maps.pop(name, None)
        return scan(self.view(name, 0), self.folder / name, start, check_bodies)

    def digest(self, name: str, end: int) -> str:
        """XXH3-128 of the first `end` bytes of a segment."""
        if self._writer is not None and name == self._writer.header.name and end == self._writer.size:
            return self._writer.digest
        if self._digests.get(name, (0, ""))[0] != end:
            self._digests[name] = (end, xxhash.xxh3_128_hexdigest(self.view(name, end)[:end]))
        return self._digests[name][1]

    # ---------------------------------------------------------------------------------------------------------- writing

    def append(
        self, labels: Sequence[Sequence[str]], entries: np.ndarray, bodies: Sequence[bytes], seen: int
    ) -> tuple[int, np.ndarray]:
        """Write rows. Returns the segment's number and the bodies' offsets. Raises ReplayError with everything before
        intact."""
        if self._writer is None or self._writer.size >= SEGMENT_BYTES:
            self._writer = self._next_writer()
        return self.number(self._writer.header.name), self._writer.append(labels, entries, bodies, seen)

    def _next_writer(self) -> SegmentWriter:
        assert self.writable, "opened read-only"
        self.close_writer()
        if self._generation is None:
            self._generation = 1 + max((int(name.split("-")[3]) for name in self.on_disk()), default=0)
        header = SegmentHeader(self.kind, *self.shards, self._generation, self._next_number, self.start, self.identity)
        try:
            writer = SegmentWriter(self.folder, header)
        except OSError as error:
            raise ReplayError(f"{self.folder}: no segment can be created: {error.strerror}") from None
        self._next_number += 1
        return writer

    def begin_generation(self, start: int) -> None:
        """Start a generation: rows appended from now on replace older rows of these shards from position `start` on."""
        self.close_writer()
        self._generation, self._next_number, self.start = None, 0, start

    def end_of(self, name: str) -> int | None:
        """Number of bytes written so far where this process writes the segment, else None."""
        return self._writer.size if self._writer is not None and self._writer.header.name == name else None

    def close_writer(self) -> None:
        """Finish the open segment: put it on disk and never write to it again."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            self._digests[writer.header.name] = (writer.size, writer.digest)
            writer.sync()
            writer.close()

    def sync(self) -> None:
        """Return when everything appended is on disk."""
        if self._writer is not None:
            self._writer.sync()
            sync_folder(self.folder)

    def remove(self, names: Iterable[str]) -> int:
        """Delete segments; views still in use stay readable. Returns the bytes freed."""
        freed = 0
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                freed += (self.folder / name).stat().st_size
                (self.folder / name).unlink()
            self._maps.pop(name, None)
        return freed

    @property
    def is_open(self) -> bool:
        """False for readers and after `close`."""
        return self._lock is not None

    def close(self) -> None:
        """Finish the open segment and release the lock."""
        self.close_writer()
        self._maps.clear()
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def newest(found: Sequence[Found]) -> list[tuple[Found, list[np.ndarray]]]:
    """Pair every segment with a mask per block of the entries that count; bool [entries].

    A younger generation replaces older rows from its start on.
    """
    found = sorted(found, key=lambda f: (f.header.generation, f.header.number))
    result = []
    for one in found:
        younger = {
            (f.header.first_shard, f.header.last_shard, f.header.start)
            for f in found
            if f.header.generation > one.header.generation
        }
        result.append(
            (one, [_not_replaced(block.entries["position"], younger, one.header) for block in one.scan.blocks])
        )
    return result


def _not_replaced(positions: np.ndarray, younger: set[tuple[int, int, int]], header: SegmentHeader) -> np.ndarray:
    keep = np.ones(len(positions), bool)
    for first, last, start in younger:
        if first <= header.last_shard and header.first_shard <= last:
            keep &= positions < start
    return keep
