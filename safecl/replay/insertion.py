"""Rows on their way in: checked, cut to a prefix where the config says so, judged by the guard and the policy, and
written.

Every rank walks through the same rows and comes to the same index. It writes the bodies of the rows that it owns; of
the others it keeps lengths and labels, which is all that a draw needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING

import numpy as np

from safecl.replay.files import codec
from safecl.replay.files.hashing import shard_of
from safecl.replay.files.table import COLUMNS, UNKNOWN
from safecl.replay.rows import MemoryRow, Teacher, TeacherOutputs
from safecl.replay.selection.guard import next_refresh

if TYPE_CHECKING:
    from safecl.replay.buffer import ReplayBuffer

# Written together: enough rows that a call costs little per row, few enough that a dying process has little in flight.
CHUNK_ROWS, CHUNK_BYTES = 1024, 16 * 2**20
# A full memory is trimmed when it holds an eighth too much: sorting then costs little per row, and nobody sees the
# excess.
EXCESS = 1 / 8


@dataclass
class InsertReport:
    """seen: rows offered. admitted: rows that came in (a later row may displace them).

    Kept_out: rows turned away by the guard, by reason.
    """

    seen: int = 0
    admitted: int = 0
    kept_out: Counter[str] = field(default_factory=Counter)


_TAKEN = ("row_id", "nbytes", "length", "targets", "step", "width", "form", "prior_nll")


@dataclass(slots=True)
class _Arrival:
    """A checked row: what its table entry needs, and its parts for writing."""

    row_id: int
    ids: np.ndarray
    mask: np.ndarray
    teacher: Teacher | None
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


def insert_rows(buffer: ReplayBuffer, rows: Iterable[MemoryRow], own_outputs: int | None = None) -> InsertReport:
    """Inserts rows in chunks; each is written and indexed as a whole. See ReplayBuffer.insert."""
    report = InsertReport()
    for chunk in _chunks(buffer, rows, _Checker(buffer, own_outputs)):
        _insert_chunk(buffer, chunk, report)
        if buffer.guard.takes_statistics and buffer.num_seen == next_refresh(buffer.num_seen - 1):
            buffer.refresh_guard()
    return report


def _chunks(buffer: ReplayBuffer, rows: Iterable[MemoryRow], check: _Checker) -> Iterator[list[_Arrival]]:
    """Checked rows in portions that end where the guard takes its statistics."""
    chunk: list[_Arrival] = []
    size, own, longest = 0, _next_own(buffer), _longest_chunk(buffer)
    try:
        for number, row in enumerate(rows):
            chunk.append(_told(check, row, number, own[len(chunk)]))
            size += chunk[-1].nbytes
            if len(chunk) >= longest or size >= CHUNK_BYTES:
                yield chunk
                chunk, size, own, longest = [], 0, _next_own(buffer), _longest_chunk(buffer)
    except Exception:
        if chunk:  # the rows before the one that is wrong
            yield chunk
        raise
    if chunk:
        yield chunk


def _longest_chunk(buffer: ReplayBuffer) -> int:
    if not buffer.guard.takes_statistics:
        return CHUNK_ROWS
    return min(CHUNK_ROWS, next_refresh(buffer.num_seen) - buffer.num_seen)


def _next_own(buffer: ReplayBuffer) -> list[bool]:
    """For the next positions of the stream, whether this rank stores them."""
    return (buffer.ranks_of(range(buffer.num_seen, buffer.num_seen + CHUNK_ROWS)) == buffer.rank).tolist()


def _told(check: _Checker, row: MemoryRow, number: int, own: bool) -> _Arrival:
    try:
        return check(row, own)
    except (ValueError, TypeError) as error:
        raise ValueError(f"row {number} of this insert (source {row.source!r}): {error}") from None


class _Checker:
    """Checks rows and works out what they take and where they belong.

    own_outputs: entries per target where only the rank that owns a row brings its outputs, None where all ranks do.
    """

    def __init__(self, buffer: ReplayBuffer, own_outputs: int | None):
        self.own_outputs, self.index_code, self.guard = own_outputs, buffer.index_code, buffer.guard
        self.prefix, self.balance_by = buffer.config.prefix_tokens, buffer.config.balance_by
        self.capacity = buffer.keeper.capacity if buffer.keeper.in_bytes else None

    def __call__(self, row: MemoryRow, own: bool) -> _Arrival:
        """own: whether this rank stores the row. Raises ValueError for a row that is none."""
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
            form, width, teacher = self._announced(teacher, own)
        elif teacher is not None:
            form, width = codec.teacher_form(teacher, self.index_code)
            nll = codec.prior_nll(row, ids, mask, teacher)
        tags = codec.tag_bytes(row.tags)
        nbytes = codec.body_bytes(len(ids), targets, form, width, len(tags))
        row_id, step = self._checked_numbers(row, nbytes)
        refused = self._refused(row, nll, nbytes)
        return _Arrival(
            row_id,
            ids,
            mask,
            teacher,
            tags,
            self._label(row),
            step,
            len(ids),
            targets,
            form,
            width,
            nbytes,
            nll,
            refused,
        )

    def _announced(self, teacher: Teacher | None, own: bool) -> tuple[int, int, Teacher | None]:
        """(form, width, outputs) of a row whose outputs only its own rank has.

        All ranks reckon with the same size, and none may take the row's loss from them.
        """
        if own and (not isinstance(teacher, TeacherOutputs) or teacher.log_probs.shape[1] != self.own_outputs):
            raise ValueError(
                f"this rank owns the row, which must bring its outputs with {self.own_outputs} entries per target"
            )
        if own and teacher.log_probs.dtype != np.float16:
            raise ValueError(f"outputs that only one rank has must be fp16, not {teacher.log_probs.dtype}")
        return codec.topk_form(self.index_code), self.own_outputs, teacher if own else None

    def _checked_numbers(self, row: MemoryRow, nbytes: int) -> tuple[int, int]:
        row_id, step = int(row.row.row_id), int(row.step)
        if not 0 <= row_id < 2**63 or not 0 <= step < 2**31:
            raise ValueError(f"row_id {row_id} and step {step} must be numbers from 0 on of 63 and 31 bits")
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


def _insert_chunk(buffer: ReplayBuffer, chunk: list[_Arrival], report: InsertReport) -> None:
    """All of the chunk or, where the disk refuses, nothing."""
    positions = np.arange(buffer.num_seen, buffer.num_seen + len(chunk), dtype=np.uint64)
    categories = [buffer.keeper.category(arrival.label[2]) for arrival in chunk]
    welcome = np.array([arrival.refused is None for arrival in chunk])
    admitted = welcome & buffer.keeper.admits(buffer.keeper.priorities(positions), categories)
    chosen = np.flatnonzero(admitted).tolist()
    columns = _columns(buffer, [chunk[i] for i in chosen], positions[admitted])
    _write_own(buffer, [chunk[i] for i in chosen], columns, int(positions[-1]) + 1)
    amounts = buffer.keeper.amounts(np.array([arrival.nbytes for arrival in chunk]))
    for category in set(categories):
        buffer.keeper.count(category, int(amounts[welcome & np.array([c == category for c in categories])].sum()))
    kept_out = Counter(arrival.refused for arrival in chunk if arrival.refused is not None)
    report.kept_out += kept_out
    buffer.guard.kept_out += kept_out
    buffer.table.append(columns)
    buffer.num_seen += len(chunk)
    report.seen += len(chunk)
    report.admitted += len(chosen)
    buffer.trim(EXCESS)


def _columns(buffer: ReplayBuffer, arrivals: list[_Arrival], positions: np.ndarray) -> dict[str, np.ndarray]:
    """Table columns of arrivals, places and checksums not yet known."""
    count = len(arrivals)
    columns = {name: np.zeros(count, dtype) for name, dtype in COLUMNS.items()}
    for name, values in (
        zip(_TAKEN, zip(*map(attrgetter(*_TAKEN), arrivals), strict=True), strict=True) if arrivals else ()
    ):
        columns[name][:] = values
    columns["position"], columns["shard"] = positions, shard_of(positions, buffer.seed)
    columns["label"][:] = [buffer.labels.number(arrival.label) for arrival in arrivals]
    columns["segment"][:] = UNKNOWN
    columns["score"][:] = columns["first_score"][:] = np.nan
    return columns


def _write_own(buffer: ReplayBuffer, arrivals: list[_Arrival], columns: dict[str, np.ndarray], seen: int) -> None:
    """Writes the bodies of this rank's rows and fills in where they are."""
    first, last = buffer.store.shards
    own = np.flatnonzero((columns["shard"] >= first) & (columns["shard"] <= last))
    if len(own) == 0:
        return
    bodies = [
        codec.encode(a.ids, a.mask, a.teacher, buffer.index_code, a.tags) for a in (arrivals[i] for i in own.tolist())
    ]
    sums = [
        codec.checksum(position, body) for position, body in zip(columns["position"][own].tolist(), bodies, strict=True)
    ]
    columns["checksum"][own] = np.array(sums, np.uint64)
    write_rows(buffer, columns, own, bodies, seen)


def write_rows(
    buffer: ReplayBuffer, columns: dict[str, np.ndarray], rows: np.ndarray, bodies: list[bytes], seen: int
) -> None:
    """Appends bodies to this rank's segment and sets `segment` and `offset` of these rows."""
    labels, local = np.unique(columns["label"][rows], return_inverse=True)
    entries = np.zeros(len(rows), codec.ENTRY)
    for name in codec.ENTRY.names:
        entries[name] = local if name == "label" else columns[name][rows]
    segment, offsets = buffer.store.append([buffer.labels[number] for number in labels.tolist()], entries, bodies, seen)
    columns["segment"][rows], columns["offset"][rows] = segment, offsets
