"""The replay buffer: one logical buffer over 1,024 virtual shards, the same for every number of ranks.

A row's key is its position in the stream of inserted rows. Its shard, its owner and its chance to stay are hashes of
(seed, position), so what the buffer holds needs no coordinator; what a step draws is a function of (seed, step,
stream), the index and the score log. Rows lie in append-only segments that are memory-mapped; the index says which rows
are held and where.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from safecl.config import ConfigError, MemoryConfig
from safecl.data.tokens import Row
from safecl.replay import snapshots
from safecl.replay.cache import SharedOutputs
from safecl.replay.files import codec
from safecl.replay.files.hashing import owner, shard_of
from safecl.replay.files.persistence import LabelBook, find_blocks, open_folder, read_newest_index, rows_found
from safecl.replay.files.store import ROWS, SegmentFolder, shards_of_rank
from safecl.replay.files.table import UNKNOWN, RowTable
from safecl.replay.insertion import InsertReport, insert_rows
from safecl.replay.rows import MemoryRow, ReplayError, Teacher
from safecl.replay.selection.draws import Drawer
from safecl.replay.selection.guard import Guard
from safecl.replay.selection.keep import Keeper

F = TypeVar("F", bound=Callable[..., Any])

PLACE_COLUMNS = ("position", "segment", "offset", "nbytes", "checksum")
READ_COLUMNS = (*PLACE_COLUMNS, "row_id", "length", "targets", "form", "width", "label", "step", "prior_nll")


def _locked(method: F) -> F:
    @functools.wraps(method)
    def run(self: ReplayBuffer, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return method(self, *args, **kwargs)

    return run  # type: ignore[return-value]


class ReplayBuffer:
    """A sharded replay buffer.

        buffer = ReplayBuffer(config.memory, folder, seed=0, rank=rank, world_size=world_size)
        buffer.insert(MemoryRow(row, source="safety.jsonl") for row in rows)        # every rank, the same rows in the same order
        keys = buffer.draw(step, num_tokens, "replay")                               # the same list on every rank
        rows = buffer.get_many([key for key in keys if buffer.rank_of(key) == rank])
        lengths = buffer.lengths(keys)                                               # of all rows, without reading any
        buffer.log_scores(step, keys, losses)                                        # of all ranks; for loss_aware and mix_cd
        buffer.flush(); barrier(); state = buffer.state_dict()                       # every rank; one saves it with its checkpoint
        buffer.publish(state["version"])                                             # when that checkpoint is on the disk
        buffer.load_state_dict(state)                                                # on any number of ranks

    A draw takes distinct rows that hold `num_tokens` tokens on average; another stream draws independently. Without a
    folder the rows lie in a temporary one. `mode="append"` writes and goes on with what is there; `"read"` only reads,
    beside a writer.

    Several ranks may share a folder (or a folder per node): each writes the rows of its own shards and knows the
    lengths of all. Raises ConfigError (BufferInUse) where another process writes the same shards or the folder was made
    with other settings, ReplayError where files are damaged or the disk is full.
    """

    STATE = ("num_seen", "version", "table", "labels", "keeper", "guard", "drawer", "held", "ignored", "_trimmed_at")
    """What a state says and `reset` empties."""

    def __init__(
        self,
        config: MemoryConfig,
        folder: str | Path | None = None,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        mode: Literal["append", "read"] = "append",
        vocab_size: int | None = None,
        teacher_of: Callable[[int, int], Teacher | None] | None = None,
    ):
        """vocab_size: width of the stored outputs; with `indices: packed` it decides how they are packed.

        teacher_of(row_id, num_targets): outputs that are kept elsewhere (CacheReader.get), for rows that bring none of
        their own.
        """
        if mode not in ("append", "read"):
            raise ValueError(f"mode {mode!r}: `append` or `read`")
        if folder is None:
            folder = tempfile.mkdtemp(prefix="safecl-memory-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.config, self.folder, self.seed, self.rank, self.world_size = config, Path(folder), seed, rank, world_size
        self.vocab_size = vocab_size
        self.index_code = codec.index_form(vocab_size or 2**31, config.teacher.indices == "packed")
        self.problems: list[str] = []
        self.teacher_of = teacher_of
        self._lock = threading.RLock()
        self.reset()
        identity = seed & (2**64 - 1)
        self.store = SegmentFolder(
            self.folder, ROWS, identity, shards_of_rank(rank, world_size), writable=mode == "append"
        )
        try:
            self._start()
        except BaseException:
            self.store.close()
            raise

    def reset(self) -> None:
        """An empty index; files stay as they are."""
        self.num_seen = self.version = 0
        self.table, self.labels = RowTable(), LabelBook()
        self.keeper, self.guard = Keeper.from_config(self.config, self.seed), Guard(self.config.guard)
        self.drawer = Drawer(self.config, self.seed)
        self.held: dict[int, list[str]] = {}
        self.ignored: list[str] = []
        self._trimmed_at = -1

    @classmethod
    def open(cls, folder: str | Path, mode: Literal["append", "read"] = "read") -> ReplayBuffer:
        """Opens a buffer with the settings that it was made with. Raises ConfigError where the folder holds none."""
        opened = read_newest_index(Path(folder))
        if opened.header is None:
            reason = "; ".join(opened.problems) or "it has no index"
            raise ConfigError(f"{folder}: no readable memory in this folder: {reason}")
        settings = opened.header["settings"]
        return cls(
            MemoryConfig.model_validate(settings["config"]),
            folder,
            seed=settings["seed"],
            mode=mode,
            vocab_size=settings["vocab_size"],
            teacher_of=SharedOutputs.of(Path(folder)),
        )

    def _start(self) -> None:
        """Takes over what the folder holds: the newest index, and rows that were appended after it."""
        opened = open_folder(self.store)
        self.problems += opened.problems
        if opened.header is not None:
            snapshots.check_settings(self, opened.header["settings"], str(self.folder))
            self.problems += snapshots.take_over(self, opened.header, opened.table)
        rows, seen = rows_found(opened.found, self.store, self.labels, self.seed, self.num_seen)
        if len(rows):
            for label, amount in zip(rows["label"].tolist(), self.keeper.amounts(rows["nbytes"]).tolist(), strict=True):
                self.keeper.count(self.keeper.category(self.labels[label][2]), amount)
            self.table.append(rows.columns())
        self.num_seen = self.store.start = max(self.num_seen, seen)
        if self.store.writable and opened.header is None and self.writes_index:
            snapshots.write(self, next_version=False)

    @property
    def writes_index(self) -> bool:
        """True on the one rank that writes the index of a shared folder."""
        return self.store.shards[0] == 0

    # -------------------------------------------------------------------------------------------------------- inserting

    @_locked
    def insert(self, rows: Iterable[MemoryRow], own_outputs: int | None = None) -> InsertReport:
        """Adds rows to the stream; the policy says which stay. Every rank inserts the same rows in the same order.

        own_outputs: k, where only the rank that owns a row has its top-k outputs and the others insert it without; the
        owners of the next n rows are `ranks_of(range(num_seen, num_seen + n))`. A guard and mix_cd then need
        `prior_nll` on every rank.

        Returns how many came in, and what kept others out. Raises ValueError for a row that is none (ids, mask or
        teacher do not fit), and ReplayError where the disk refuses; rows before the one in question are in.
        """
        if not self.store.writable:
            raise ValueError(f"{self.folder}: opened read-only; open it with mode='append' to insert rows")
        return insert_rows(self, rows, own_outputs)

    def trim(self, excess: float = 0.0) -> None:
        """Lets go of the rows that the policy does not keep, once the memory holds that share of its capacity too
        much."""
        if self._trimmed_at == self.table.version:
            return
        if self.keeper.total(self.table["nbytes"]) > self.keeper.capacity * (1 + excess):
            groups = self.labels.groups
            names = sorted({self.keeper.category(group) for group in groups})
            category = np.array([names.index(self.keeper.category(group)) for group in groups])[self.table["label"]]
            self.table.keep(self.keeper.survivors(self.table["position"], self.table["nbytes"], category, names))
        elif excess:
            return
        self._trimmed_at = self.table.version

    def refresh_guard(self) -> None:
        """Takes the guard's statistics of the rows held, and lets go of outliers."""
        self.trim()
        self.table.keep(~self.guard.refresh(self.table["prior_nll"]))

    # ---------------------------------------------------------------------------------------------------------- drawing

    @_locked
    def draw(self, step: int, num_tokens: int, stream: str) -> list[int]:
        """Keys of distinct rows that hold `num_tokens` tokens on average, or of all rows where there are not as many.

        The same list on every rank. How many rows it has does not depend on which they are, so that long and short rows
        are drawn alike.

        A function of (seed, step, stream), the rows held, and for loss_aware and mix_cd of the losses logged for steps
        before step - 1.
        """
        if num_tokens < 1:
            return []
        self.trim()
        rows = self.drawer.draw(self.table, self.labels.groups, step, num_tokens, stream)
        return self.table["position"][rows].tolist()

    @_locked
    def log_scores(self, step: int, keys: Sequence[int] | np.ndarray, losses: Sequence[float] | np.ndarray) -> None:
        """Logs the mean NLL (nats per target) of the rows that step `step` replayed. Every rank logs the rows of all
        ranks, in any order.

        Rows that are not held and losses that are not finite are passed over. Raises ReplayError where draws already
        relied on this step.
        """
        self.trim()
        self.drawer.log(
            self.table, self.labels.groups, step, np.asarray(keys, np.uint64), np.asarray(losses, np.float32)
        )

    # ---------------------------------------------------------------------------------------------------------- reading

    @_locked
    def __len__(self) -> int:
        self.trim()
        return len(self.table)

    @_locked
    def keys(self) -> list[int]:
        """Keys of all rows held, in the order of insertion."""
        self.trim()
        return self.table["position"].tolist()

    def rank_of(self, key: int, world_size: int | None = None) -> int:
        """Rank that owns a row, of `world_size` ranks (this buffer's by default); rows need not be held."""
        return int(owner(int(shard_of(np.array([key], np.uint64), self.seed)[0]), world_size or self.world_size))

    def ranks_of(self, keys: Sequence[int], world_size: int | None = None) -> np.ndarray:
        """`rank_of` for many keys; int64 [n]."""
        return owner(shard_of(np.asarray(keys, np.uint64), self.seed).astype(np.int64), world_size or self.world_size)

    @_locked
    def length(self, key: int) -> int:
        """Tokens of a row. Raises KeyError where it is not held."""
        return int(self.table["length"][self.table.find_one(key)])

    @_locked
    def num_targets(self, key: int) -> int:
        """Supervised tokens of a row. Raises KeyError where it is not held."""
        return int(self.table["targets"][self.table.find_one(key)])

    @_locked
    def lengths(self, keys: Sequence[int]) -> np.ndarray:
        """Tokens of rows, int64 [n]."""
        return self.table["length"][self.table.find(keys)].astype(np.int64)

    @_locked
    def targets(self, keys: Sequence[int]) -> np.ndarray:
        """Supervised tokens of rows, int64 [n]."""
        return self.table["targets"][self.table.find(keys)].astype(np.int64)

    @_locked
    def row_ids(self, keys: Sequence[int]) -> np.ndarray:
        """Content keys of rows (safecl.data.Row.row_id), uint64 [n]."""
        return self.table["row_id"][self.table.find(keys)]

    @_locked
    def get(self, key: int) -> MemoryRow:
        """A row; its arrays are read-only views of the mapped file.

        Raises KeyError where the row is not held, ReplayError where it is damaged.
        """
        return self._read([self.table.find_one(key)])[0]

    @_locked
    def get_many(self, keys: Sequence[int]) -> list[MemoryRow]:
        """Rows in the order of the keys; see `get`."""
        return self._read(self.table.find(keys))

    def _read(self, rows: np.ndarray | list[int]) -> list[MemoryRow]:
        if (self.table["segment"][rows] == UNKNOWN).any():
            self.locate()
        return [
            self._decode(*line)
            for line in zip(*(self.table[name][rows].tolist() for name in READ_COLUMNS), strict=True)
        ]

    def _decode(
        self, position, segment, offset, nbytes, digest, row_id, length, targets, form, width, label, step, prior_nll
    ) -> MemoryRow:
        body = self.body(position, segment, offset, nbytes, digest)
        try:
            ids, mask, teacher, tags = codec.decode(body, length, targets, form, width)
        except ValueError as error:
            raise ReplayError(
                f"{self.folder / self.store.name(segment)}: row {position} is not one that safecl wrote: {error}"
            ) from None
        if teacher is None and self.teacher_of is not None:
            teacher = self.teacher_of(row_id, targets)
        source, task, _ = self.labels[label]
        return MemoryRow(Row(row_id, ids, mask), source, task, step, tags, teacher, prior_nll)

    def body(self, position: int, segment: int, offset: int, nbytes: int, digest: int) -> memoryview:
        """The bytes of a row, checked. Raises ReplayError."""
        if segment == UNKNOWN:
            rank = self.rank_of(position)
            where = f"it lies on rank {rank}" if rank != self.rank else "its segment is missing or cut"
            raise ReplayError(f"row {position} is not in {self.folder}: {where}")
        body = self.store.read(segment, offset, nbytes)
        if codec.checksum(position, body) != digest:
            where = f"{self.folder / self.store.name(segment)}: row {position} at byte {offset}"
            raise ReplayError(f"{where} is damaged; `safecl memory verify {self.folder} --repair` drops damaged rows")
        return body

    @_locked
    def locate(self) -> None:
        """Finds rows that other ranks, or this one before a state of another rank was loaded, wrote into this
        folder."""
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

    # ---------------------------------------------------------------------------------------------- saving and resuming

    @_locked
    def flush(self) -> None:
        """Returns when every row inserted and the index of them are on the disk."""
        self.trim()
        snapshots.write(self)

    @_locked
    def state_dict(self) -> dict[str, Any]:
        """{"version": int, "index": uint8 [bytes]}: which rows are held, where they lie, hashes of the segments, the
        score log; no rows.

        Every rank calls it, after all have flushed into a shared folder (a barrier in between); the result is the same
        on all of them. The segments that it names stay until a later version is published.
        """
        self.trim()
        self.locate()
        return snapshots.state_dict(self)

    @_locked
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state, for any number of ranks; rows inserted after it are forgotten. Every rank calls it.

        Raises ReplayError where the index is damaged or a segment is missing, cut or changed, ConfigError where the
        settings differ; the buffer is then as it was.
        """
        snapshots.load_state_dict(self, state)

    @_locked
    def publish(self, version: int, retain: Iterable[int] = ()) -> int:
        """Says that a checkpoint with the state `version` is on the disk, and which older ones still exist; every rank
        calls it.

        Deletes segments that neither these states nor the buffer need. Returns the bytes freed by this rank.
        """
        return snapshots.publish(self, version, retain)

    @_locked
    def verify(self, repair: bool = False) -> list[str]:
        """Reads every byte and returns what is wrong, one line each; empty if all is well. `repair` lets go of rows
        that cannot be read."""
        return snapshots.verify(self, repair)

    @_locked
    def close(self) -> None:
        """Flushes and gives up the writer's lock. Rows that were read stay valid."""
        try:
            if self.store.writable and self.store.is_open:
                self.flush()
        finally:
            self.store.close()

    def __enter__(self) -> ReplayBuffer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
