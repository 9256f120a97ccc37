"""Insertion of rows: check them, cut them to a prefix where the config says so, apply the guard and the policy, write.

Every rank goes through the same rows and arrives at the same index. It writes the bodies of the rows that it owns; of
the others it keeps lengths and labels, which is all that a draw needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np

from safecl.replay.contents import Contents
from safecl.replay.files import codec
from safecl.replay.files.hashing import shard_of
from safecl.replay.files.table import COLUMNS, UNKNOWN
from safecl.replay.rows import MemoryRow, TeacherOutputs
from safecl.replay.selection.guard import next_refresh

# Rows written together: enough that a call costs little per row, few enough that a dying process loses little.
CHUNK_ROWS, CHUNK_BYTES = 1024, 16 * 2**20
# A full memory is trimmed when it exceeds its capacity by an eighth, so that sorting costs little per row. Every reader
# trims first and never sees the excess.
EXCESS = 1 / 8


@dataclass
class InsertReport:
    """seen: rows offered. admitted: rows that entered the memory (a later row may displace them).

    kept_out: rows refused by the guard, by reason.
    """

    seen: int = 0
    admitted: int = 0
    kept_out: Counter[str] = field(default_factory=Counter)


_TAKEN = ("row_id", "nbytes", "length", "targets", "step", "width", "form", "prior_nll")


@dataclass(slots=True)
class _Arrival:
    """A checked row: the values of its table entry, and its parts for writing."""

    row_id: int
    ids: np.ndarray
    mask: np.ndarray
    teacher: TeacherOutputs | None
    tags: bytes
    label: tuple[str, str, str]
    step: int
    length: int
    targets: int
    form: int
    width: int
    nbytes: int
    prior_nll: float
    refused: str | None = None


def insert_rows(contents: Contents, rows: Iterable[MemoryRow], own_outputs: int | None = None) -> InsertReport:
    """Insert rows in chunks, each written and indexed as a whole. See ReplayBuffer.insert."""
    report = InsertReport()
    for chunk in _chunks(contents, rows, _Checker(contents, own_outputs)):
        _insert_chunk(contents, chunk, report)
        if contents.guard.takes_statistics and contents.num_seen == next_refresh(contents.num_seen - 1):
            contents.refresh_guard()
    return report


def _chunks(contents: Contents, rows: Iterable[MemoryRow], check: _Checker) -> Iterator[list[_Arrival]]:
    """Yield checked rows in chunks that end where the guard computes its statistics."""
    chunk: list[_Arrival] = []
    size, own, longest = 0, _next_own(contents), _longest_chunk(contents)
    try:
        for number, row in enumerate(rows):
            chunk.append(_check_numbered(check, row, number, own[len(chunk)]))
            size += chunk[-1].nbytes
            if len(chunk) >= longest or size >= CHUNK_BYTES:
                yield chunk
                chunk, size, own, longest = [], 0, _next_own(contents), _longest_chunk(contents)
    except Exception:
        if chunk:  # the rows before the wrong one
            yield chunk
        raise
    if chunk:
        yield chunk


def _longest_chunk(contents: Contents) -> int:
    if not contents.guard.takes_statistics:
        return CHUNK_ROWS
    return min(CHUNK_ROWS, next_refresh(contents.num_seen) - contents.num_seen)


def _next_own(contents: Contents) -> list[bool]:
    """Return for each of the next positions whether this rank stores it."""
    return (contents.ranks_of(range(contents.num_seen, contents.num_seen + CHUNK_ROWS)) == contents.rank).tolist()


def _check_numbered(check: _Checker, row: MemoryRow, number: int, own: bool) -> _Arrival:
    """Check a row; an error names its number and source."""
    try:
        return check(row, own)
    except (ValueError, TypeError) as error:
        raise ValueError(f"row {number} of this insert (source {row.source!r}): {error}") from None


class _Checker:
    """Checks rows and computes their sizes, labels and losses.

    own_outputs: entries per target where only the rank that owns a row passes its outputs, None where all ranks do.
    """

    def __init__(self, contents: Contents, own_outputs: int | None):
        self.own_outputs, self.index_code, self.guard = own_outputs, contents.index_code, contents.guard
        self.prefix, self.balance_by = contents.config.prefix_tokens, contents.config.balance_by
        self.capacity = contents.keeper.capacity if contents.keeper.in_bytes else None

    def __call__(self, row: MemoryRow, own: bool) -> _Arrival:
        """own: whether this rank stores the row. Raises ValueError for an invalid row."""
        ids = codec.checked_ids(row.row.input_ids)
        mask = codec.checked_mask(row.row.loss_mask, len(ids))
        targets = int(np.count_nonzero(mask))
        teacher, form, width, nll = row.teacher, 0, 0, float(row.prior_nll)
        if teacher is not None:
            teacher = codec.checked_teacher(teacher, targets)
        if self.prefix is not None and targets > self.prefix:
            ids, mask, teacher = codec.cut_to_prefix(ids, mask, teacher, self.prefix)
            targets = self.prefix
        if self.own_outputs is not None:
            form, width = codec.topk_form(self.index_code), self.own_outputs
            teacher = self._checked_own(teacher, self.own_outputs) if own else None
        elif teacher is not None:
            form, width = codec.teacher_form(teacher, self.index_code)
            nll = codec.prior_nll(row, ids, mask, teacher)
        tags = codec.tag_bytes(row.tags)
        nbytes = codec.body_bytes(len(ids), targets, form, width, len(tags))
        row_id, step = self._checked_numbers(row, nbytes)
        return _Arrival(
            row_id=row_id,
            ids=ids,
            mask=mask,
            teacher=teacher,
            tags=tags,
            label=self._label(row),
            step=step,
            length=len(ids),
            targets=targets,
            form=form,
            width=width,
            nbytes=nbytes,
            prior_nll=nll,
            refused=self._refused(row, nll, nbytes),
        )

    def _checked_own(self, teacher: TeacherOutputs | None, k: int) -> TeacherOutputs:
        """Check outputs that only the rank of their row has.

        All ranks count the same size for the row, and none may compute the row's loss from its outputs.
        """
        if teacher is None or teacher.log_probs.shape[1] != k:
            raise ValueError(f"this rank owns the row, so it must have the outputs, with {k} entries per target")
        if teacher.log_probs.dtype != np.float16:
            raise ValueError(f"outputs that only one rank has must be fp16, not {teacher.log_probs.dtype}")
        return teacher

    def _checked_numbers(self, row: MemoryRow, nbytes: int) -> tuple[int, int]:
        row_id, step = int(row.row.row_id), int(row.step)
        if not 0 <= row_id < 2**63 or not 0 <= step < 2**31:
            raise ValueError(f"row_id {row_id} and step {step}: must lie from 0 to 2^63 - 1 and from 0 to 2^31 - 1")
        if nbytes >= 2**32:
            raise ValueError(f"the row takes {nbytes:,} bytes; at most 4 GiB can be stored, keep fewer outputs of it")
        return row_id, step

    def _refused(self, row: MemoryRow, nll: float, nbytes: int) -> str | None:
        if self.capacity is not None and nbytes > self.capacity:
            return f"larger than the whole memory of {self.capacity:,} bytes"
        return self.guard.reason(nll, row.tags) if self.guard.config is not None else None

    def _label(self, row: MemoryRow) -> tuple[str, str, str]:
        if self.balance_by in ("task", "source"):
            return row.source, row.task, getattr(row, self.balance_by)
        return row.source, row.task, str(row.tags.get(self.balance_by, "")) if row.tags else ""


def _insert_chunk(contents: Contents, chunk: list[_Arrival], report: InsertReport) -> None:
    """Insert the whole chunk, or nothing where a write fails."""
    keeper = contents.keeper
    positions = np.arange(contents.num_seen, contents.num_seen + len(chunk), dtype=np.uint64)
    categories = [keeper.category(arrival.label[2]) for arrival in chunk]
    accepted = np.array([arrival.refused is None for arrival in chunk])
    admitted = accepted & keeper.admits(keeper.priorities(positions), categories)
    arrivals = [chunk[i] for i in np.flatnonzero(admitted).tolist()]
    columns = _columns(contents, arrivals, positions[admitted])
    _write_own(contents, arrivals, columns, int(positions[-1]) + 1)
    amounts = keeper.amounts(np.array([arrival.nbytes for arrival in chunk]))
    for category in set(categories):
        keeper.count(category, int(amounts[accepted & np.array([c == category for c in categories])].sum()))
    kept_out = Counter(arrival.refused for arrival in chunk if arrival.refused is not None)
    report.kept_out += kept_out
    contents.guard.kept_out += kept_out
    contents.table.append(columns)
    contents.num_seen += len(chunk)
    report.seen += len(chunk)
    report.admitted += len(arrivals)
    contents.trim(EXCESS)


def _columns(contents: Contents, arrivals: list[_Arrival], positions: np.ndarray) -> dict[str, np.ndarray]:
    """Make table columns of arrivals, without places and checksums."""
    columns = {name: np.zeros(len(arrivals), dtype) for name, dtype in COLUMNS.items()}
    if arrivals:
        taken = zip(*map(attrgetter(*_TAKEN), arrivals), strict=True)
        for name, values in zip(_TAKEN, taken, strict=True):
            columns[name][:] = values
    columns["position"], columns["shard"] = positions, shard_of(positions, contents.seed)
    columns["label"][:] = [contents.labels.number(arrival.label) for arrival in arrivals]
    columns["segment"][:] = UNKNOWN
    columns["score"][:] = columns["first_score"][:] = np.nan
    return columns


def _write_own(contents: Contents, arrivals: list[_Arrival], columns: dict[str, np.ndarray], seen: int) -> None:
    """Write the bodies of this rank's rows and fill in their places and checksums."""
    first, last = contents.store.shards
    own = np.flatnonzero((columns["shard"] >= first) & (columns["shard"] <= last))
    if len(own) == 0:
        return
    bodies = [
        codec.encode(a.ids, a.mask, a.teacher, contents.index_code, a.tags) for a in (arrivals[i] for i in own.tolist())
    ]
    sums = [
        codec.checksum(position, body) for position, body in zip(columns["position"][own].tolist(), bodies, strict=True)
    ]
    columns["checksum"][own] = np.array(sums, np.uint64)
    contents.write_rows(columns, own, bodies, seen)
