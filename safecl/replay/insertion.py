"""Rows on their way in: checked, cut to a prefix where the config says so, judged by the guard and the policy, and written.

Every rank walks through the same rows and comes to the same index. It writes the bodies of the rows that it owns; of the others it keeps
lengths and labels, which is all that a draw needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from safecl.config import MemoryConfig
from safecl.replay import codec
from safecl.replay.guard import next_refresh
from safecl.replay.hashing import shard_of
from safecl.replay.rows import MemoryRow, Teacher, TeacherOutputs
from safecl.replay.table import COLUMNS, UNKNOWN

if TYPE_CHECKING:
    from safecl.replay.buffer import ReplayBuffer

# Written together: enough rows that a call costs little per row, few enough that a dying process has little in flight.
CHUNK_ROWS, CHUNK_BYTES = 1024, 16 * 2**20
# A full memory is trimmed when it holds an eighth too much: sorting then costs little per row, and nobody sees the excess.
EXCESS = 1 / 8


@dataclass
class InsertReport:
    """seen: rows offered. admitted: rows that came in (a later row may displace them).

    Kept_out: rows turned away by the guard, by reason.
    """

    seen: int = 0
    admitted: int = 0
    kept_out: Counter[str] = field(default_factory=Counter)


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
    for chunk in _chunks(buffer, rows, own_outputs):
        _insert_chunk(buffer, chunk, report)
        if buffer.guard.takes_statistics and buffer.num_seen == next_refresh(buffer.num_seen - 1):
            buffer.refresh_guard()
    return report


def _chunks(buffer: ReplayBuffer, rows: Iterable[MemoryRow], own_outputs: int | None) -> Iterator[list[_Arrival]]:
    """Checked rows in portions that end where the guard takes its statistics."""
    chunk: list[_Arrival] = []
    size, own = 0, _next_own(buffer)
    try:
        for number, row in enumerate(rows):
            chunk.append(_checked(buffer, row, number, _Outputs(own_outputs, own[len(chunk)])))
            size += chunk[-1].nbytes
            at_refresh = buffer.guard.takes_statistics and buffer.num_seen + len(chunk) == next_refresh(buffer.num_seen)
            if len(chunk) >= CHUNK_ROWS or size >= CHUNK_BYTES or at_refresh:
                yield chunk
                chunk, size, own = [], 0, _next_own(buffer)
    except Exception:
        if chunk:  # the rows before the one that is wrong
            yield chunk
        raise
    if chunk:
        yield chunk


@dataclass(frozen=True, slots=True)
class _Outputs:
    """width: entries per target where only a row's own rank brings its outputs, None where all do. own: whether this rank is it."""

    width: int | None
    own: bool


def _next_own(buffer: ReplayBuffer) -> list[bool]:
    """For the next positions of the stream, whether this rank stores them."""
    return (buffer.ranks_of(range(buffer.num_seen, buffer.num_seen + CHUNK_ROWS)) == buffer.rank).tolist()


def _checked(buffer: ReplayBuffer, row: MemoryRow, number: int, outputs: _Outputs) -> _Arrival:
    try:
        return _check(buffer, row, outputs)
    except (ValueError, TypeError) as error:
        raise ValueError(f"row {number} of this insert (source {row.source!r}): {error}") from None


def _check(buffer: ReplayBuffer, row: MemoryRow, outputs: _Outputs) -> _Arrival:
    config: MemoryConfig = buffer.config
    ids = codec.checked_ids(row.row.input_ids)
    mask = codec.checked_mask(row.row.loss_mask, len(ids))
    targets = int(np.count_nonzero(mask))
    teacher = codec.checked_teacher(row.teacher, targets)
    if config.prefix_tokens is not None and targets > config.prefix_tokens:
        ids, mask, teacher = codec.cut_to_prefix(ids, mask, teacher, config.prefix_tokens)
        targets = config.prefix_tokens
    form, width = codec.teacher_form(teacher, buffer.index_code)
    if outputs.width is not None:
        form, width, teacher = _announced(teacher, outputs, buffer.index_code)
    tags = codec.tag_bytes(row.tags)
    nbytes = codec.body_bytes(len(ids), targets, form, width, len(tags))
    if nbytes >= 2**32:
        raise ValueError(f"the row takes {nbytes:,} bytes; at most 4 GiB can be stored, keep fewer outputs of it")
    group = {"task": row.task, "source": row.source}.get(config.balance_by)
    label = (row.source, row.task, str(row.tags.get(config.balance_by, "")) if group is None else group)
    # all ranks must come to the same loss, so outputs that only one of them has cannot tell it
    nll = float(row.prior_nll) if outputs.width is not None else codec.prior_nll(row, ids, mask, teacher)
    refused = buffer.guard.reason(nll, row.tags)
    if buffer.keeper.in_bytes and nbytes > buffer.keeper.capacity:
        refused = f"larger than the whole memory ({config.capacity})"
    row_id, step = int(row.row.row_id), int(row.step)
    if not 0 <= row_id < 2**63 or not 0 <= step < 2**31:
        raise ValueError(f"row_id {row_id} and step {step} must be numbers from 0 on of 63 and 31 bits")
    return _Arrival(row_id, ids, mask, teacher, tags, label, step, len(ids), targets, form, width, nbytes, nll, refused)


def _announced(teacher: Teacher | None, outputs: _Outputs, index_code: int) -> tuple[int, int, Teacher | None]:
    """(form, width, outputs) of a row whose outputs only its own rank has: the size is the same on all of them."""
    if outputs.own and (not isinstance(teacher, TeacherOutputs) or teacher.log_probs.shape[1] != outputs.width):
        raise ValueError(f"this rank owns the row, which must bring its outputs with {outputs.width} entries per target")
    if outputs.own and teacher.log_probs.dtype != np.float16:
        raise ValueError(f"outputs that only one rank has must be fp16, not {teacher.log_probs.dtype}")
    return codec.topk_form(index_code), outputs.width, teacher if outputs.own else None


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
    for arrival, category, amount in zip(chunk, categories, amounts.tolist(), strict=True):
        if arrival.refused is None:
            buffer.keeper.count(category, amount)
        else:
            report.kept_out[arrival.refused] += 1
            buffer.guard.kept_out[arrival.refused] += 1
    buffer.table.append(columns)
    buffer.num_seen += len(chunk)
    report.seen += len(chunk)
    report.admitted += len(chosen)
    buffer.trim(EXCESS)


def _columns(buffer: ReplayBuffer, arrivals: list[_Arrival], positions: np.ndarray) -> dict[str, np.ndarray]:
    """Table columns of arrivals, places and checksums not yet known."""
    count = len(arrivals)
    columns = {name: np.zeros(count, dtype) for name, dtype in COLUMNS.items()}
    for name in ("row_id", "nbytes", "length", "targets", "step", "width", "form", "prior_nll"):
        columns[name][:] = [getattr(arrival, name) for arrival in arrivals]
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
    bodies = [codec.encode(a.ids, a.mask, a.teacher, buffer.index_code, a.tags) for a in (arrivals[i] for i in own.tolist())]
    sums = [codec.checksum(position, body) for position, body in zip(columns["position"][own].tolist(), bodies, strict=True)]
    columns["checksum"][own] = np.array(sums, np.uint64)
    write_rows(buffer, columns, own, bodies, seen)


def write_rows(buffer: ReplayBuffer, columns: dict[str, np.ndarray], rows: np.ndarray, bodies: list[bytes], seen: int) -> None:
    """Appends bodies to this rank's segment and sets `segment` and `offset` of these rows."""
    labels, local = np.unique(columns["label"][rows], return_inverse=True)
    entries = np.zeros(len(rows), codec.ENTRY)
    for name in codec.ENTRY.names:
        entries[name] = local if name == "label" else columns[name][rows]
    segment, offsets = buffer.store.append([buffer.labels[number] for number in labels.tolist()], entries, bodies, seen)
    columns["segment"][rows], columns["offset"][rows] = segment, offsets
