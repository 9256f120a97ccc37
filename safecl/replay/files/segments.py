"""Segments: append-only, self-describing files of rows. Written bytes never change.

    segment = header (64 bytes) | block | block | ...
    block   = header (64 bytes) | labels as JSON, blanks up to 8 bytes | table of entries (codec.ENTRY) | bodies

A block is written by one call, header and table first. So a process that dies in the middle leaves a file whose
complete rows can be found: those whose bodies lie within the file and have the right checksum. Checksums cover every
byte: the segment's header, a block's header with labels and table, each body.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from safecl.replay.files.codec import ENTRY, checksum
from safecl.replay.rows import ReplayError

FORMAT_VERSION = 1
_SEGMENT = struct.Struct("<8sIIIIIIQQ8xQ")
_BLOCK = struct.Struct("<8sIIQQQ8xQQ")
_SEGMENT_MAGIC, _BLOCK_MAGIC = b"SAFECLSG", b"SAFECLBK"
HEADER_BYTES = _SEGMENT.size
assert _SEGMENT.size == _BLOCK.size == 64


@dataclass(frozen=True)
class SegmentHeader:
    """The header of a segment.

    kind: 0 rows of a buffer, 1 cached teacher outputs. first_shard, last_shard: the shards of its rows, both included.
    generation: number of earlier starts of a writer of these shards. number: its place among the generation's segments.
    start: rows seen when the generation began; it replaces rows of older generations from there on. identity: hash of
    the memory or cache that it belongs to.
    """

    kind: int
    first_shard: int
    last_shard: int
    generation: int
    number: int
    start: int
    identity: int

    @property
    def name(self) -> str:
        kind = ("rows", "cache")[self.kind]
        return f"{kind}-{self.first_shard:04d}-{self.last_shard:04d}-{self.generation:04d}-{self.number:05d}.segment"

    @property
    def shards(self) -> tuple[int, int]:
        """First and last shard."""
        return self.first_shard, self.last_shard

    def pack(self) -> bytes:
        values = (self.kind, self.first_shard, self.last_shard, self.generation, self.number, self.start, self.identity)
        head = _SEGMENT.pack(_SEGMENT_MAGIC, FORMAT_VERSION, *values, 0)
        return head[:-8] + xxhash.xxh3_64_digest(head[:-8])

    @classmethod
    def unpack(cls, data: bytes, path: Path) -> SegmentHeader:
        """Parse a header. Raises ReplayError where the bytes are none, are damaged, or have another format version."""
        if len(data) < HEADER_BYTES or data[:8] != _SEGMENT_MAGIC:
            raise ReplayError(f"{path}: not a segment of a safecl memory, or its beginning is damaged")
        if data[56:64] != xxhash.xxh3_64_digest(data[:56]):
            raise ReplayError(f"{path}: its header is damaged")
        _, version, *values, _ = _SEGMENT.unpack(data[:HEADER_BYTES])
        if version != FORMAT_VERSION:
            raise ReplayError(f"{path}: format version {version}, this safecl reads version {FORMAT_VERSION}")
        return cls(*values)


@dataclass
class Block:
    """A block found in a file.

    entries: codec.ENTRY [rows]. offsets: int64 [rows], where their bodies begin. seen: rows of the stream seen after
    it. end: the byte after it.
    """

    labels: list[list[str]]
    entries: np.ndarray
    offsets: np.ndarray
    seen: int
    end: int


@dataclass
class Scan:
    """Blocks and problems found by reading a segment; `end` is the first byte after the last good row."""

    blocks: list[Block] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    end: int = HEADER_BYTES


class SegmentWriter:
    """Appends blocks to a new file. A write that fails leaves the file unchanged."""

    def __init__(self, folder: Path, header: SegmentHeader):
        self.header, self.path, self.size = header, folder / header.name, 0
        self._digest = xxhash.xxh3_128()
        self._file = open(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644), "wb", buffering=0)
        try:
            self._write(header.pack())
        except ReplayError:
            self._file.close()
            self.path.unlink(missing_ok=True)
            raise

    def append(
        self, labels: Sequence[Sequence[str]], entries: np.ndarray, bodies: Sequence[bytes], seen: int
    ) -> np.ndarray:
        """Write a block. Returns the offset of each body, int64 [rows]. Raises ReplayError where the write fails; the
        file is then unchanged."""
        text = json.dumps([list(label) for label in labels], ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        body_bytes = sum(map(len, bodies))
        tail = text + entries.tobytes()
        head = _BLOCK.pack(
            _BLOCK_MAGIC, len(entries), len(text), body_bytes, seen, self.size, xxhash.xxh3_64_intdigest(tail), 0
        )[:-8]
        first = self.size + _BLOCK.size + len(tail)
        self._write(b"".join([head, xxhash.xxh3_64_digest(head), tail, *bodies]))
        return (
            first + np.concatenate([[0], np.cumsum(entries["nbytes"][:-1], dtype=np.int64)])
            if len(entries)
            else np.zeros(0, np.int64)
        )

    def _write(self, data: bytes) -> None:
        view, done = memoryview(data), 0
        try:
            while done < len(view):
                done += os.write(self._file.fileno(), view[done:])
        except OSError as error:
            self._file.truncate(self.size)
            self._file.seek(self.size)
            raise ReplayError(
                f"{self.path}: {error.strerror} while writing {len(view):,} bytes; rows inserted before are intact"
            ) from None
        self.size += len(view)
        self._digest.update(view)

    @property
    def digest(self) -> str:
        """XXH3-128 of all bytes written so far."""
        return self._digest.hexdigest()

    def sync(self) -> None:
        """Return when the bytes are on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_header(path: Path) -> SegmentHeader:
    """Read the header of a segment. Raises ReplayError."""
    with path.open("rb") as file:
        return SegmentHeader.unpack(file.read(HEADER_BYTES), path)


def scan(data: memoryview, path: Path, start: int = HEADER_BYTES, check_bodies: bool = True) -> Scan:
    """Find the blocks of a file from `start` on.

    Damage is named in `problems` and skipped. A torn last block gives its complete rows.
    """
    found = Scan(end=start)
    for offset, problem in _block_offsets(data, start):
        if problem:
            found.problems.append(f"{path.name}: {problem}")
            continue
        block = _read_block(data, offset)
        whole = block.offsets + block.entries["nbytes"] <= len(data)
        torn = not whole.all() or block.end > len(data)
        if not whole.all():  # the writer died in the middle: the stream continues with the first missing row
            block.seen = min(block.seen, int(block.entries["position"][~whole].min()))
        good = whole & _bodies_hold(data, block, whole) if check_bodies or torn else whole
        for i in np.flatnonzero(whole & ~good):
            found.problems.append(
                f"{path.name}: row {block.entries['position'][i]} at byte {block.offsets[i]} does not have its checksum"
            )
        block.entries, block.offsets = block.entries[good], block.offsets[good]
        found.end = (
            int(block.offsets[-1]) + int(block.entries["nbytes"][-1])
            if torn and good.any()
            else offset
            if torn
            else block.end
        )
        found.blocks.append(block)
    return found


def _bodies_hold(data: memoryview, block: Block, whole: np.ndarray) -> np.ndarray:
    rows = zip(
        block.offsets.tolist(), block.entries["nbytes"].tolist(), block.entries["position"].tolist(), strict=True
    )
    sums = [
        checksum(position, data[start : start + size]) if ok else 0
        for (start, size, position), ok in zip(rows, whole, strict=True)
    ]
    return np.array(sums, np.uint64) == block.entries["checksum"]


def _block_offsets(data: memoryview, start: int) -> Iterator[tuple[int, str]]:
    """Yield the offset of each block with a good header, and a message for each stretch of damaged bytes."""
    offset = start
    while offset < len(data):
        end = _block_end(data, offset)
        if end is not None:
            yield offset, ""
            offset = end
            continue
        after = _next_block(data, offset + 1)
        if after is None:
            if not _is_torn(data, offset):
                yield offset, f"{len(data) - offset:,} bytes from byte {offset} on are damaged"
            return
        yield offset, f"bytes {offset} to {after - 1} are damaged"
        offset = after


def _is_torn(data: memoryview, offset: int) -> bool:
    """True where a dying process left the end of the file: a block whose header or table is incomplete."""
    head = bytes(data[offset : offset + _BLOCK.size])
    if len(head) < _BLOCK.size:
        return head[:8] == _BLOCK_MAGIC[: len(head)]
    table_end = _table_end(head, offset)
    return table_end is not None and table_end > len(data)


def _table_end(head: bytes, offset: int) -> int | None:
    """Return where the block's table ends according to its header; None where the header is damaged."""
    if len(head) < _BLOCK.size or head[:8] != _BLOCK_MAGIC or head[-8:] != xxhash.xxh3_64_digest(head[:-8]):
        return None
    _, num_rows, num_text, _, _, own_offset, _, _ = _BLOCK.unpack(head)
    return offset + _BLOCK.size + num_text + num_rows * ENTRY.itemsize if own_offset == offset else None


def _block_end(data: memoryview, offset: int) -> int | None:
    """Return the byte after a block whose header, labels and table are right; None where they are not."""
    head = bytes(data[offset : offset + _BLOCK.size])
    table_end = _table_end(head, offset)
    if table_end is None or table_end > len(data):
        return None
    _, _, _, body_bytes, _, _, table_sum, _ = _BLOCK.unpack(head)
    held = xxhash.xxh3_64_intdigest(data[offset + _BLOCK.size : table_end]) == table_sum
    return table_end + body_bytes if held else None


def _next_block(data: memoryview, start: int) -> int | None:
    """Return the next offset where a whole block begins, so that damage costs the rows of one block only."""
    search = bytes(data[start:])
    at = search.find(_BLOCK_MAGIC)
    while at >= 0:
        if _block_end(data, start + at) is not None:
            return start + at
        at = search.find(_BLOCK_MAGIC, at + 1)
    return None


def _read_block(data: memoryview, offset: int) -> Block:
    _, num_rows, num_text, body_bytes, seen, _, _, _ = _BLOCK.unpack(data[offset : offset + _BLOCK.size])
    text_end = offset + _BLOCK.size + num_text
    entries = np.frombuffer(data, ENTRY, num_rows, text_end)
    first = text_end + num_rows * ENTRY.itemsize
    sizes = entries["nbytes"].astype(np.int64)
    labels = json.loads(bytes(data[offset + _BLOCK.size : text_end]))
    return Block(labels, entries, first + np.cumsum(sizes) - sizes, seen, first + body_bytes)
