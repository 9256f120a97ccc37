"""The index in memory and on disk: one line per row held, in columns, sorted by position.

An index file holds everything but the rows: a header as JSON (settings, labels, segments with their lengths and
hashes), the columns, and a hash of all this. The same bytes go into a checkpoint. Reading an index maps the columns;
they are copied into memory when rows are added or dropped.

    "SAFECLIX" | uint64 header bytes | header JSON, blanks up to 64 | columns, each from a multiple of 64 on
               | XXH3-128 of all before
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xxhash

from safecl.replay.rows import ReplayError

COLUMNS: dict[str, str] = {
    "position": "<u8",
    "row_id": "<u8",
    "checksum": "<u8",
    "offset": "<u8",
    "segment": "<i4",  # by the header's list; UNKNOWN where another rank wrote the row
    "nbytes": "<u4",
    "length": "<u4",
    "targets": "<u4",
    "step": "<u4",
    "label": "<u4",
    "width": "<u4",
    "prior_nll": "<f4",
    "first_score": "<f4",  # the first and the last loss logged for the row, NaN for none
    "score": "<f4",
    "shard": "<u2",
    "form": "<u1",
}
UNKNOWN = -1

_MAGIC = b"SAFECLIX"
_HEAD = struct.Struct("<8sQ")
_FORMAT = 1


class RowTable:
    """Columns by name (`COLUMNS`), all of the same length, sorted by position. `version` counts the changes to the set
    of rows held."""

    def __init__(self, columns: Mapping[str, np.ndarray] | None = None):
        self._columns = dict(columns) if columns else {name: np.zeros(0, dtype) for name, dtype in COLUMNS.items()}
        self._size = len(self._columns["position"])
        self.version = 0

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a column; writable after `own()`."""
        return self._columns[name][: self._size]

    def columns(self) -> dict[str, np.ndarray]:
        """Return all columns by name."""
        return {name: self[name] for name in COLUMNS}

    def append(self, rows: Mapping[str, np.ndarray]) -> None:
        """Add rows whose positions lie beyond all others."""
        added = len(rows["position"])
        need = self._size + added
        if need > len(self._columns["position"]) or not self._columns["position"].flags.writeable:
            # A sixteenth more than needed: copying stays linear in the rows, and the slack stays below 5 bytes a row.
            self._resize(need + need // 16)
        for name, column in self._columns.items():
            column[self._size : need] = rows[name]
        self._size, self.version = need, self.version + 1

    def _resize(self, capacity: int) -> None:
        for name in self._columns:
            old = self[name]
            new = np.empty(capacity, old.dtype)
            new[: self._size] = old
            self._columns[name] = new

    def own(self) -> None:
        """Make the columns writable."""
        if not self._columns["position"].flags.writeable:
            self._resize(self._size)

    def keep(self, mask: np.ndarray) -> None:
        """Drop the rows where `mask` is False."""
        if mask.all():
            return
        for name in self._columns:
            self._columns[name] = self[name][mask]
        self._size, self.version = int(mask.sum()), self.version + 1

    def find(self, keys: np.ndarray | Sequence[int]) -> np.ndarray:
        """Return the row numbers of keys, int64 [n]. Raises KeyError naming the first that is not held."""
        keys = np.asarray(keys, np.uint64)
        rows = np.searchsorted(self["position"], keys)
        held = rows < self._size
        held[held] = self["position"][rows[held]] == keys[held]
        if not held.all():
            raise KeyError(f"the memory does not hold row {int(keys[~held][0])}")
        return rows

    def find_one(self, key: int) -> int:
        """Return the row number of a key. Raises KeyError."""
        position = self["position"]
        row = int(position.searchsorted(np.uint64(key))) if key >= 0 else self._size
        if row == self._size or position[row] != key:
            raise KeyError(f"the memory does not hold row {key}")
        return row


def dump_index(header: Mapping[str, Any], table: RowTable) -> bytes:
    """Return the bytes of an index file."""
    layout = [[name, dtype] for name, dtype in COLUMNS.items()]
    text = json.dumps(
        {"format": _FORMAT, "num_rows": len(table), "columns": layout, **header}, ensure_ascii=False, allow_nan=False
    ).encode()
    text += b" " * (-(len(text) + _HEAD.size) % 64)
    parts = [_HEAD.pack(_MAGIC, len(text)), text]
    for name in COLUMNS:
        column = np.ascontiguousarray(table[name], COLUMNS[name]).tobytes()
        parts += [column, b"\0" * (-len(column) % 64)]
    data = b"".join(parts)
    return data + xxhash.xxh3_128_digest(data)


def load_index(data: memoryview, where: str) -> tuple[dict[str, Any], RowTable]:
    """Return (header, table) of an index; the table's columns are views. Raises ReplayError where the bytes are damaged
    or of another format."""
    if len(data) < _HEAD.size + 16 or bytes(data[:8]) != _MAGIC:
        raise ReplayError(f"{where}: not an index of a safecl memory, or its beginning is damaged")
    if bytes(data[-16:]) != xxhash.xxh3_128_digest(data[:-16]):
        raise ReplayError(f"{where}: the index is damaged (its hash does not match)")
    try:
        num_text = _HEAD.unpack(data[: _HEAD.size])[1]
        header = json.loads(bytes(data[_HEAD.size : _HEAD.size + num_text]))
        if header["format"] != _FORMAT or header["columns"] != [list(item) for item in COLUMNS.items()]:
            raise ReplayError(f"{where}: index format {header['format']}, this safecl reads format {_FORMAT}")
        return header, RowTable(_read_columns(data, _HEAD.size + num_text, header["num_rows"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ReplayError(f"{where}: not an index that safecl wrote: {error}") from None


def _read_columns(data: memoryview, at: int, num_rows: int) -> dict[str, np.ndarray]:
    columns = {}
    for name, dtype in COLUMNS.items():
        columns[name] = np.frombuffer(data, dtype, num_rows, at)
        at += -(-columns[name].nbytes // 64) * 64
    return columns
