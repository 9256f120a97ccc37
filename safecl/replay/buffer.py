"""The replay buffer: one logical buffer over 1,024 virtual shards, the same for every number of ranks.

A row's key is its position in the stream of inserted rows. Its shard, its owner and its priority in the reservoir are
hashes of (seed, position), so ranks agree on what the buffer holds without communication. The rows that a step draws
are a function of (seed, step, stream), the index and the score log. Rows lie in append-only segments that are
memory-mapped; the index says which rows are held and where they lie.

The buffer copies its rows and does not refer to them by their index in the prepared data set, because

- `safecl memory show|export|verify` read a memory's folder alone, after its source or the prepared data is gone;
- rows also come from `safecl memory import` and from one's own loop, where no prepared data set exists;
- the copy costs little: 4.1 bytes a token, against 388 a supervised token for outputs with k = 64. Rows of an aligned
  model and of finished tasks bring such outputs, and so does the shared cache; both need the segments, their index and
  their recovery anyway. Indices would save a few lines of the codec.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import numpy as np

from safecl.config import ConfigError, MemoryConfig
from safecl.replay import snapshots
from safecl.replay.cache import SharedOutputs
from safecl.replay.contents import Contents
from safecl.replay.files.persistence import LabelBook, read_newest_index
from safecl.replay.files.store import ROWS, SegmentFolder, shards_of_rank
from safecl.replay.files.table import RowTable
from safecl.replay.insertion import InsertReport, insert_rows
from safecl.replay.rows import MemoryRow, TeacherOutputs
from safecl.replay.selection.draws import Drawer
from safecl.replay.selection.guard import Guard
from safecl.storage.temporary import temporary_folder

P = ParamSpec("P")
T = TypeVar("T")


def _locked(method: Callable[Concatenate[ReplayBuffer, P], T]) -> Callable[Concatenate[ReplayBuffer, P], T]:
    """Run a method under the buffer's lock: a thread may fetch rows while another saves."""

    @functools.wraps(method)
    def run(self: ReplayBuffer, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._lock:
            return method(self, *args, **kwargs)

    return run


class ReplayBuffer:
    """A sharded replay buffer. Its methods may be called from several threads.

        buffer = ReplayBuffer(config.memory, folder, seed=0, rank=rank, world_size=world_size)
        buffer.insert(MemoryRow(row, source="safety.jsonl") for row in rows)    # every rank: the same rows in one order
        keys = buffer.draw(step, num_tokens, "replay")                          # the same list on every rank
        rows = buffer.get_many([key for key in keys if buffer.rank_of(key) == rank])
        lengths = buffer.lengths(keys)                                          # of all rows, without reading any
        buffer.log_scores(step, keys, losses)                                   # of all ranks; for loss_aware, mix_cd
        buffer.flush(); barrier(); state = buffer.state_dict()                  # every rank; one saves it
        buffer.publish(state["version"])                                        # once that checkpoint is on disk
        buffer.load_state_dict(state)                                           # on any number of ranks

    A draw takes distinct rows that hold `num_tokens` tokens on average. Draws of different streams are independent.
    Without a folder the rows lie in a temporary one. `mode="append"` adds to what the folder holds; `"read"` only
    reads, also while another process writes.

    Several ranks may share a folder (or a folder per node): each writes the rows of its own shards and knows the
    lengths of all. Raises ConfigError (BufferInUse) where another process writes the same shards or the folder was made
    with other settings, ReplayError where files are damaged or the disk is full.
    """

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
        teacher_of: Callable[[int, int], TeacherOutputs | None] | None = None,
    ):
        """vocab_size: width of the stored outputs; with `indices: packed` it decides how they are packed.

        teacher_of(row_id, num_targets): returns outputs stored elsewhere (CacheReader.get), for rows without outputs of
        their own.
        """
        if mode not in ("append", "read"):
            raise ValueError(f"mode {mode!r}: `append` or `read`")
        if folder is None:
            folder = temporary_folder("memory", self)
        self.config, self.folder, self.seed, self.rank, self.world_size = config, Path(folder), seed, rank, world_size
        self.teacher_of = teacher_of
        self._lock = threading.RLock()
        shards, identity = shards_of_rank(rank, world_size), seed & (2**64 - 1)
        self.store = SegmentFolder(self.folder, ROWS, identity, shards, writable=mode == "append")
        try:
            self._contents = Contents(
                config, self.store, seed=seed, rank=rank, world_size=world_size, vocab_size=vocab_size
            )
            snapshots.open_contents(self._contents)
        except BaseException:
            self.store.close()
            raise

    @classmethod
    def open(cls, folder: str | Path, mode: Literal["append", "read"] = "read") -> ReplayBuffer:
        """Open a buffer with the settings that it was made with. Raises ConfigError where the folder holds none."""
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

    # --------------------------------------------------------------------------------------------------------- contents

    @property
    def num_seen(self) -> int:
        """Rows inserted so far; the next row's key."""
        return self._contents.num_seen

    @property
    def version(self) -> int:
        """Version of the newest saved state."""
        return self._contents.version

    @property
    def problems(self) -> list[str]:
        """Damage found when the folder was opened, one line each."""
        return self._contents.problems

    @property
    def table(self) -> RowTable:
        """One line per row held, in columns."""
        return self._contents.table

    @property
    def labels(self) -> LabelBook:
        """(source, task, category) by the number in the table's column `label`."""
        return self._contents.labels

    @property
    def guard(self) -> Guard:
        """The guard, with its count of rows kept out."""
        return self._contents.guard

    @property
    def drawer(self) -> Drawer:
        """The draw policy, with the score log."""
        return self._contents.drawer

    # -------------------------------------------------------------------------------------------------------- inserting

    @_locked
    def insert(self, rows: Iterable[MemoryRow], own_outputs: int | None = None) -> InsertReport:
        """Add rows to the stream; the policy decides which stay. Every rank inserts the same rows in the same order.

        own_outputs: k, where only the rank that owns a row has its top-k outputs and the others insert it without; the
        owners of the next n rows are `ranks_of(range(num_seen, num_seen + n))`. A guard and mix_cd then need
        `prior_nll` on every rank.

        Returns how many rows were admitted, and why others were kept out. Raises ValueError for an invalid row (ids,
        mask or teacher do not fit), ReplayError where a write fails; the rows before it are inserted.
        """
        if not self.store.writable:
            raise ValueError(f"{self.folder}: opened read-only; open it with mode='append' to insert rows")
        return insert_rows(self._contents, rows, own_outputs)

    # ---------------------------------------------------------------------------------------------------------- drawing

    @_locked
    def draw(self, step: int, num_tokens: int, stream: str) -> list[int]:
        """Return the keys of distinct rows that hold `num_tokens` tokens on average, or of all rows if they hold fewer.

        The list is the same on every rank. The number of rows does not depend on which rows are drawn, so long and
        short rows are equally likely.

        A function of (seed, step, stream), the rows held, and for loss_aware and mix_cd of the losses logged for steps
        before step - 1.
        """
        if num_tokens < 1:
            return []
        self._contents.trim()
        rows = self.drawer.draw(self.table, self.labels.groups, step, num_tokens, stream)
        return self.table["position"][rows].tolist()

    @_locked
    def log_scores(self, step: int, keys: Sequence[int] | np.ndarray, losses: Sequence[float] | np.ndarray) -> None:
        """Log the mean NLL (nats per target) of the rows that step `step` replayed. Every rank logs the rows of all
        ranks, in any order.

        Rows that are not held and losses that are not finite are ignored. Raises ReplayError where draws already relied
        on this step.
        """
        self._contents.trim()
        self.drawer.log(
            self.table, self.labels.groups, step, np.asarray(keys, np.uint64), np.asarray(losses, np.float32)
        )

    # ---------------------------------------------------------------------------------------------------------- reading

    @_locked
    def __len__(self) -> int:
        self._contents.trim()
        return len(self.table)

    @_locked
    def keys(self) -> list[int]:
        """Return the keys of all rows held, in the order of insertion."""
        self._contents.trim()
        return self.table["position"].tolist()

    def rank_of(self, key: int, world_size: int | None = None) -> int:
        """Return the rank that owns a row among `world_size` ranks (default: this buffer's). Rows need not be held."""
        return int(self._contents.ranks_of([key], world_size)[0])

    def ranks_of(self, keys: Sequence[int], world_size: int | None = None) -> np.ndarray:
        """`rank_of` for many keys; int64 [n]."""
        return self._contents.ranks_of(keys, world_size)

    @_locked
    def length(self, key: int) -> int:
        """Number of tokens of a row. Raises KeyError where it is not held."""
        return int(self.table["length"][self.table.find_one(key)])

    @_locked
    def num_targets(self, key: int) -> int:
        """Number of supervised tokens of a row. Raises KeyError where it is not held."""
        return int(self.table["targets"][self.table.find_one(key)])

    @_locked
    def lengths(self, keys: Sequence[int]) -> np.ndarray:
        """Number of tokens of each row, int64 [n]."""
        return self.table["length"][self.table.find(keys)].astype(np.int64)

    @_locked
    def targets(self, keys: Sequence[int]) -> np.ndarray:
        """Number of supervised tokens of each row, int64 [n]."""
        return self.table["targets"][self.table.find(keys)].astype(np.int64)

    @_locked
    def row_ids(self, keys: Sequence[int]) -> np.ndarray:
        """Content hash of each row (safecl.data.Row.row_id), uint64 [n]."""
        return self.table["row_id"][self.table.find(keys)]

    @_locked
    def get(self, key: int) -> MemoryRow:
        """Read a row; its arrays are read-only views of the mapped file.

        Raises KeyError where the row is not held, ReplayError where it is damaged.
        """
        return self._contents.read([self.table.find_one(key)], self.teacher_of)[0]

    @_locked
    def get_many(self, keys: Sequence[int]) -> list[MemoryRow]:
        """Read rows in the order of the keys; see `get`."""
        return self._contents.read(self.table.find(keys), self.teacher_of)

    # ---------------------------------------------------------------------------------------------- saving and resuming

    @_locked
    def flush(self) -> None:
        """Return when all inserted rows and their index are on disk."""
        self._contents.trim()
        snapshots.write(self._contents)

    @_locked
    def state_dict(self) -> dict[str, Any]:
        """Return {"version": int, "index": uint8 [bytes]}: which rows are held, where they lie, hashes of the segments
        and the score log; no rows.

        Every rank calls it, after all have flushed into a shared folder (a barrier in between); the result is the same
        on all of them. The segments that it names stay until a later version is published.
        """
        self._contents.trim()
        self._contents.locate()
        return snapshots.state_dict(self._contents)

    @_locked
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Return to a saved state, on any number of ranks; rows inserted after it are forgotten. Every rank calls it.

        Raises ReplayError where the index is damaged or a segment is missing, cut or changed, ConfigError where the
        settings differ; the buffer is then unchanged.
        """
        snapshots.load_state_dict(self._contents, state)

    @_locked
    def publish(self, version: int, retain: Iterable[int] = ()) -> int:
        """Declare that a checkpoint with the state `version` is on disk, and which older ones still exist. Every rank
        calls it.

        Deletes segments that neither these states nor the buffer need. Returns the bytes freed by this rank.
        """
        return snapshots.publish(self._contents, version, retain)

    @_locked
    def verify(self, repair: bool = False) -> list[str]:
        """Read every byte and return what is damaged, one line each. `repair` drops rows that cannot be read."""
        return snapshots.verify(self._contents, repair)

    @_locked
    def close(self) -> None:
        """Flush and release the writer's lock. Rows that were read stay valid."""
        try:
            if self.store.writable and self.store.is_open:
                self.flush()
        finally:
            self.store.close()

    def __enter__(self) -> ReplayBuffer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
