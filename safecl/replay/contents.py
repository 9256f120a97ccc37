"""The contents of a memory: the table of rows, the rules that choose among them, and the folder with their bytes.

`ReplayBuffer` (buffer.py) is this behind a lock. insertion.py adds rows to it, snapshots.py saves and restores it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from safecl.config import MemoryConfig
from safecl.data.tokens import Row
from safecl.replay.files import codec
from safecl.replay.files.hashing import owner, shard_of
from safecl.replay.files.persistence import LabelBook, find_blocks, rows_found
from safecl.replay.files.store import SegmentFolder
from safecl.replay.files.table import UNKNOWN, RowTable
from safecl.replay.rows import MemoryRow, ReplayError, TeacherOutputs
from safecl.replay.selection.draws import Drawer
from safecl.replay.selection.guard import Guard
from safecl.replay.selection.keep import Keeper

STATE = ("num_seen", "version", "table", "labels", "keeper", "guard", "drawer", "held", "ignored", "trimmed_at")
"""The attributes that a saved state restores and `reset` empties."""

PLACE_COLUMNS = ("position", "segment", "offset", "nbytes", "checksum")


class _Entry(NamedTuple):
    """The columns of the table that reading a row needs."""

    position: int
    segment: int
    offset: int
    nbytes: int
    checksum: int
    row_id: int
    length: int
    targets: int
    form: int
    width: int
    label: int
    step: int
    prior_nll: float


class Contents:
    """The rows that a memory holds and the rules that choose among them. No lock: one thread at a time.

    num_seen: rows inserted so far; the next row's position. version: that of the newest saved state. held: names of the
    segments that each version needs. ignored: segments whose rows a loaded state does not have. trimmed_at: the table's
    version when it was last trimmed. problems: damage found when the folder was opened.
    """

    def __init__(
        self,
        config: MemoryConfig,
        store: SegmentFolder,
        *,
        seed: int,
        rank: int,
        world_size: int,
        vocab_size: int | None,
    ):
        self.config, self.store, self.folder = config, store, store.folder
        self.seed, self.rank, self.world_size, self.vocab_size = seed, rank, world_size, vocab_size
        self.index_code = codec.index_form(vocab_size or 2**31, config.teacher.indices == "packed")
        self.problems: list[str] = []
        self.reset()

    def reset(self) -> None:
        """Empty the index. Files stay as they are."""
        self.num_seen = self.version = 0
        self.table, self.labels = RowTable(), LabelBook()
        self.keeper, self.guard = Keeper.from_config(self.config, self.seed), Guard(self.config.guard)
        self.drawer = Drawer(self.config, self.seed)
        self.held: dict[int, list[str]] = {}
        self.ignored: list[str] = []
        self.trimmed_at = -1

    @property
    def writes_index(self) -> bool:
        """True on the one rank that writes the index of a shared folder."""
        return self.store.shards[0] == 0

    def ranks_of(self, keys: Sequence[int] | np.ndarray, world_size: int | None = None) -> np.ndarray:
        """Return the rank that owns each row, int64 [n]."""
        return owner(shard_of(np.asarray(keys, np.uint64), self.seed).astype(np.int64), world_size or self.world_size)

    # --------------------------------------------------------------------------------------------------- what is kept

    def trim(self, excess: float = 0.0) -> None:
        """Drop the rows that the policy does not keep, once the memory exceeds its capacity by the share `excess`."""
        if self.trimmed_at == self.table.version:
            return
        if self.keeper.total(self.table["nbytes"]) > self.keeper.capacity * (1 + excess):
            groups = self.labels.groups
            names = sorted({self.keeper.category(group) for group in groups})
            category = np.array([names.index(self.keeper.category(group)) for group in groups])[self.table["label"]]
            self.table.keep(self.keeper.survivors(self.table["position"], self.table["nbytes"], category, names))
        elif excess:
            return
        self.trimmed_at = self.table.version

    def refresh_guard(self) -> None:
        """Compute the guard's statistics from the rows held, and drop outliers."""
        self.trim()
        self.table.keep(~self.guard.refresh(self.table["prior_nll"]))

    # --------------------------------------------------------------------------------------------- rows and their bytes

    def read(
        self, rows: np.ndarray | list[int], teacher_of: Callable[[int, int], TeacherOutputs | None] | None
    ) -> list[MemoryRow]:
        """Read rows by their row numbers in the table. Raises ReplayError for a damaged row."""
        if (self.table["segment"][rows] == UNKNOWN).any():
            self.locate()
        found = []
        for entry in map(_Entry._make, zip(*(self.table[name][rows].tolist() for name in _Entry._fields), strict=True)):
            row = self._decode(entry)
            if row.teacher is None and teacher_of is not None:
                row = replace(row, teacher=teacher_of(row.row.row_id, entry.targets))
            found.append(row)
        return found

    def _decode(self, entry: _Entry) -> MemoryRow:
        body = self.body(entry.position, entry.segment, entry.offset, entry.nbytes, entry.checksum)
        try:
            ids, mask, teacher, tags = codec.decode(body, entry.length, entry.targets, entry.form, entry.width)
        except ValueError as error:
            path = self.folder / self.store.name(entry.segment)
            raise ReplayError(f"{path}: row {entry.position} cannot be decoded: {error}") from None
        source, task, _ = self.labels[entry.label]
        return MemoryRow(Row(entry.row_id, ids, mask), source, task, entry.step, tags, teacher, entry.prior_nll)

    def body(self, position: int, segment: int, offset: int, nbytes: int, digest: int) -> memoryview:
        """Return the bytes of a row after checking them. Raises ReplayError."""
        if segment == UNKNOWN:
            rank = int(self.ranks_of([position])[0])
            where = f"it lies on rank {rank}" if rank != self.rank else "its segment is missing or cut"
            raise ReplayError(f"row {position} is not in {self.folder}: {where}")
        body = self.store.read(segment, offset, nbytes)
        if codec.checksum(position, body) != digest:
            where = f"{self.folder / self.store.name(segment)}: row {position} at byte {offset}"
            raise ReplayError(f"{where} is damaged; `safecl memory verify {self.folder} --repair` drops damaged rows")
        return body

    def locate(self) -> None:
        """Find the rows whose place is unknown: other ranks wrote them, or this one before it loaded another rank's
        state."""
        missing = np.flatnonzero(self.table["segment"] == UNKNOWN)
        if len(missing) == 0:
            return
        names = [name for name in self.store.on_disk() if name not in self.ignored]
        blocks, _ = find_blocks(self.store, names, {}, check_bodies=False)
        found, _ = rows_found(blocks, self.store, self.labels, self.seed)
        missing = missing[np.isin(self.table["position"][missing], found["position"])]
        at = np.searchsorted(found["position"], self.table["position"][missing])
        same = found["row_id"][at] == self.table["row_id"][missing]
        self.table.own()
        for name in ("segment", "offset", "nbytes", "checksum", "form", "width"):
            self.table[name][missing[same]] = found[name][at[same]]

    def write_rows(self, columns: dict[str, np.ndarray], rows: np.ndarray, bodies: list[bytes], seen: int) -> None:
        """Append bodies to this rank's segment and set `segment` and `offset` of these rows."""
        labels, local = np.unique(columns["label"][rows], return_inverse=True)
        entries = np.zeros(len(rows), codec.ENTRY)
        for name in codec.ENTRY_COLUMNS:
            entries[name] = local if name == "label" else columns[name][rows]
        segment, offsets = self.store.append([self.labels[number] for number in labels.tolist()], entries, bodies, seen)
        columns["segment"][rows], columns["offset"][rows] = segment, offsets
