"""Tokenised rows in columns: memory-mapped .npy files, one array per column, rows back to back.

    tokens.npy   int32  [num_tokens]     loss_mask.npy  bool   [num_tokens]     offsets.npy  int64 [num_rows + 1]
    row_ids.npy  uint64 [num_rows]       num_targets.npy int32 [num_rows]       lines.npy    int64 [num_rows]
    tags.npy     uint8  [num_bytes]      tag_offsets.npy int64 [num_rows + 1]   meta.json    file sizes and the report

A row's id is a 63-bit hash of its content and of the number of equal rows before it. Removing one row leaves the ids of
all rows with other content unchanged, and so their places in an epoch and the draws that are keyed by the ids.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from safecl.data.messages import ChatRow
from safecl.storage.durable import map_array

_COLUMNS = {
    "tokens": np.int32,
    "loss_mask": np.bool_,
    "offsets": np.int64,
    "row_ids": np.uint64,
    "num_targets": np.int32,
    "lines": np.int64,
    "tags": np.uint8,
    "tag_offsets": np.int64,
}


@dataclass(frozen=True)
class Row:
    """One tokenised example.

    row_id: 63-bit key. input_ids: int32 [length]. loss_mask: bool [length], True for supervised targets; False at 0.
    """

    row_id: int
    input_ids: np.ndarray
    loss_mask: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        return int(self.loss_mask.sum())


def content_digest(row: ChatRow) -> bytes:
    """Hash the row's messages to 16 bytes."""
    content = json.dumps([[m.role, m.content, m.train] for m in row.messages])
    more = [[m.thought, m.tools] for m in row.messages]
    if any(extra != [None, None] for extra in more):  # other rows keep the ids that they have always had
        content += json.dumps(more)
    calls = [[m.calls, m.tool] for m in row.messages]
    if any(extra != [None, None] for extra in calls):
        content += json.dumps(calls)
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


def row_key(digest: bytes, occurrence: int) -> int:
    """Return the 63-bit key of the `occurrence`-th (from 0) row with this content."""
    key = hashlib.blake2b(digest + occurrence.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(key, "little") >> 1


class Occurrences:
    """Gives out row ids, and counts equal rows for that."""

    def __init__(self) -> None:
        self._seen: Counter[bytes] = Counter()

    def key(self, digest: bytes) -> int:
        self._seen[digest] += 1
        return row_key(digest, self._seen[digest] - 1)


@dataclass(frozen=True)
class Report:
    """Counts from preparing a file. seen: rows; bad: those left out; truncated: rows cut to max_length;
    max_token_id: the largest id; template: origin of the chat template; examples: the first bad rows; notes: what is
    not used, with counts."""

    path: str = ""
    seen: int = 0
    bad: int = 0
    truncated: int = 0
    max_length: int = 0
    max_token_id: int = 0
    template: str = ""
    examples: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PreparedFile:
    """The arrays of one prepared file, each mapped read-only."""

    arrays: dict[str, np.ndarray]
    path: str
    report: Report = field(default_factory=Report)
    key: str = ""


class TokenDataset:
    """Rows of one or more prepared files; `select` and `concat` copy indices, never tokens.

    row_ids: uint64 [N]. lengths, num_targets: int32 [N], in tokens. lines: int64 [N], from 1.
    """

    def __init__(
        self, stores: Sequence[PreparedFile], store_of: np.ndarray, index: np.ndarray, row_ids: np.ndarray | None = None
    ):
        self._stores, self._store_of, self._index = tuple(stores), store_of, index
        self.row_ids = self._column("row_ids", np.uint64) if row_ids is None else row_ids
        self.num_targets = self._column("num_targets", np.int32)
        self.lines = self._column("lines", np.int64)
        self.lengths = self._column("lengths", np.int32)

    @classmethod
    def from_store(cls, store: PreparedFile) -> TokenDataset:
        num_rows = len(store.arrays["row_ids"])
        return cls([store], np.zeros(num_rows, np.int16), np.arange(num_rows))

    def _column(self, name: str, dtype: Any) -> np.ndarray:
        out = np.empty(len(self._index), dtype)
        for number, store in enumerate(self._stores):
            chosen = self._store_of == number
            column = np.diff(store.arrays["offsets"]) if name == "lengths" else store.arrays[name]
            out[chosen] = column[self._index[chosen]]
        return out

    def __len__(self) -> int:
        return len(self._index)

    def row(self, i: int) -> Row:
        """Return row `i`; its arrays are read-only views of the mapped files."""
        store, (start, stop) = self._find(i, "offsets")
        return Row(int(self.row_ids[i]), store.arrays["tokens"][start:stop], store.arrays["loss_mask"][start:stop])

    def rows(self, indices: Iterable[int]) -> list[Row]:
        return [self.row(i) for i in indices]

    @property
    def paths(self) -> set[str]:
        """The files of all rows."""
        return {store.path for store in self._stores if store.path}

    def path(self, i: int) -> str:
        """Return the file of row `i`."""
        return self._stores[self._store_of[i]].path

    def tags(self, i: int) -> dict[str, str]:
        """Return the short scalar columns that row `i` has in addition to its text."""
        store, (start, stop) = self._find(i, "tag_offsets")
        return json.loads(store.arrays["tags"][start:stop].tobytes()) if stop > start else {}

    def _find(self, i: int, name: str) -> tuple[PreparedFile, tuple[int, int]]:
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        store, index = self._stores[self._store_of[i]], int(self._index[i])
        offsets = store.arrays[name]
        return store, (int(offsets[index]), int(offsets[index + 1]))

    def select(self, indices: Sequence[int] | np.ndarray) -> TokenDataset:
        """Return the rows at these indices, in this order, with their ids."""
        indices = np.asarray(indices, np.int64)
        return TokenDataset(self._stores, self._store_of[indices], self._index[indices], self.row_ids[indices])

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def total_targets(self) -> int:
        return int(self.num_targets.sum(dtype=np.int64))

    @property
    def supervised_share(self) -> float:
        """Supervised tokens per token."""
        return self.total_targets / max(self.num_tokens, 1)

    @property
    def max_token_id(self) -> int:
        """Largest token id in the files; a model's vocabulary must be larger."""
        return max(report.max_token_id for report in self.reports)

    @property
    def reports(self) -> list[Report]:
        """The report of each prepared file: bad rows, truncated rows."""
        return [store.report for store in self._stores]

    @property
    def key(self) -> str:
        """Hash of all rows with their tokens and masks: the key for caches of results from this data."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (*(store.key.encode() for store in self._stores), self._store_of, self._index, self.row_ids):
            digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()


def concat(datasets: Sequence[TokenDataset]) -> TokenDataset:
    """Join data sets, one after the other. A row that is in several of them gets an id of its own in each."""
    stores = [store for d in datasets for store in d._stores]
    firsts = np.cumsum([0, *(len(d._stores) for d in datasets)])
    store_of = np.concatenate([d._store_of + first for d, first in zip(datasets, firsts, strict=False)])
    index = np.concatenate([d._index for d in datasets])
    row_ids = _distinct(np.concatenate([d.row_ids for d in datasets]))
    return TokenDataset(stores, store_of.astype(np.int16), index, row_ids)


def _distinct(row_ids: np.ndarray) -> np.ndarray:
    if len(np.unique(row_ids)) == len(row_ids):
        return row_ids
    out, taken = row_ids.copy(), set()
    for i, key in enumerate(row_ids.tolist()):
        occurrence = 0
        while (new := key if occurrence == 0 else row_key(key.to_bytes(16, "little"), occurrence)) in taken:
            occurrence += 1
        taken.add(new)
        out[i] = new
    return out


# -------------------------------------------------------------------------------------------------- writing and mapping


class _NpyWriter:
    """A one-dimensional .npy file that grows; numpy leaves room in its header for the final length."""

    def __init__(self, path: Path, dtype: Any):
        self._file, self._dtype, self._length = path.open("wb"), np.dtype(dtype), 0
        self._header()

    def _header(self) -> None:
        description = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._length,),
        }
        np.lib.format.write_array_header_1_0(self._file, description)

    def append(self, values: Any) -> None:
        values = np.ascontiguousarray(values, self._dtype)
        self._file.write(values.tobytes())
        self._length += len(values)

    def close(self) -> int:
        size = self._file.tell()
        self._file.seek(0)
        self._header()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return size


class StoreWriter:
    """Writes the columns of one prepared file into an empty folder. The caller publishes the folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._writers = {name: _NpyWriter(folder / f"{name}.npy", dtype) for name, dtype in _COLUMNS.items()}
        self._tokens = self._tag_bytes = 0
        self.num_rows = self.num_targets = self.max_token_id = 0
        for name in ("offsets", "tag_offsets"):
            self._writers[name].append([0])

    def add(self, row: Row, line: int, tags: dict[str, str]) -> None:
        tag_bytes = np.frombuffer(json.dumps(tags).encode() if tags else b"", np.uint8)
        self._tokens += len(row)
        self._tag_bytes += len(tag_bytes)
        num_targets = row.num_targets
        columns = {
            "tokens": row.input_ids,
            "loss_mask": row.loss_mask,
            "offsets": [self._tokens],
            "row_ids": [row.row_id],
            "num_targets": [num_targets],
            "lines": [line],
            "tags": tag_bytes,
            "tag_offsets": [self._tag_bytes],
        }
        for name, values in columns.items():
            self._writers[name].append(values)
        self.num_rows += 1
        self.num_targets += num_targets
        self.max_token_id = max(self.max_token_id, int(row.input_ids.max()))

    def close(self) -> dict[str, int]:
        """Write all to the disk and return the sizes of the files in bytes, by column."""
        return {name: writer.close() for name, writer in self._writers.items()}


def map_store(folder: Path, meta: dict[str, Any]) -> PreparedFile | None:
    """Map a published folder; None where a file in it is missing, torn or of another kind."""
    try:
        arrays = {
            name: _map_column(folder / f"{name}.npy", meta["sizes"][name], dtype) for name, dtype in _COLUMNS.items()
        }
        lists = {name: tuple(meta["report"].get(name, ())) for name in ("examples", "notes")}
        report = Report(**{**meta["report"], **lists})
        return PreparedFile(arrays, meta["path"], report, meta["key"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _map_column(path: Path, size: int, dtype: Any) -> np.ndarray:
    if path.stat().st_size != size:
        raise ValueError(f"{path} is torn")
    array = map_array(path)
    if array.dtype != dtype or array.ndim != 1:
        raise ValueError(f"{path} is not a column of {np.dtype(dtype)}")
    return array
