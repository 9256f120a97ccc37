"""The replay buffer: one logical buffer over 1,024 virtual shards, the same for every number of ranks.

A row's key is its position in the stream of inserted rows. Its shard, its owner and its chance to stay are hashes of (seed, position), so
what the buffer holds needs no coordinator; a draw is a function of (seed, step, stream) and the buffer's index.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from safecl.config import MemoryConfig
from safecl.replay import hashing, visits
from safecl.replay.rows import MemoryRow


class ReplayBuffer:
    """A sharded replay buffer.

        buffer = ReplayBuffer(config.memory, seed=0, rank=rank, world_size=world_size)
        buffer.insert(MemoryRow(row, source="safety.jsonl", teacher=outputs) for row in rows)    # every rank, the same rows
        keys = buffer.draw(step, num_tokens, "replay")                                            # every rank gets the same list
        mine = [key for key in keys if buffer.rank_of(key, world_size) == rank]
        rows = [buffer.get(key) for key in mine]                                                  # only a rank's own rows are stored here
        lengths = [buffer.length(key) for key in keys]                                            # of all rows, without reading any
        state = buffer.state_dict()                                                               # and load_state_dict(state)

    A draw takes rows until they hold `num_tokens` tokens, no row twice; another stream draws independently.
    """

    def __init__(self, config: MemoryConfig, *, seed: int = 0, rank: int = 0, world_size: int = 1):
        self.config, self.seed, self.rank, self.world_size = config, seed, rank, world_size
        self.num_seen = 0
        self._rows: dict[int, MemoryRow] = {}
        self._lengths: dict[int, tuple[int, int]] = {}
        self._layouts: dict[int, visits.RowLayout] = {}

    def __len__(self) -> int:
        return len(self._lengths)

    def insert(self, rows: Iterable[MemoryRow]) -> None:
        """Adds rows to the stream; the policy says which stay. Every rank inserts the same rows."""
        for row in rows:
            key, self.num_seen = self.num_seen, self.num_seen + 1
            self._lengths[key] = (len(row.row.input_ids), int(np.count_nonzero(row.row.loss_mask)))
            self._rows[key] = row
        self._evict()
        self._layouts.clear()

    def _evict(self) -> None:
        if len(self._lengths) <= self.config.capacity:
            return
        keys = np.fromiter(self._lengths, np.uint64)
        for key in keys[np.argsort(hashing.priority_of(keys, self.seed))[self.config.capacity :]].tolist():
            del self._lengths[key], self._rows[key]

    def draw(self, step: int, num_tokens: int, stream: str) -> list[int]:
        """Keys of distinct rows that hold `num_tokens` tokens, or of all rows where there are fewer; a function of (seed, step, stream)."""
        keys = np.fromiter(self._lengths, np.int64, len(self))
        if not len(keys):
            return []
        lengths = np.array([length for length, _ in self._lengths.values()])
        strips = visits.num_strips_for(num_tokens / lengths.mean())
        if strips not in self._layouts:
            classes = np.zeros(len(keys), np.int64)
            self._layouts[strips] = visits.lay_out(classes, 1, hashing.shard_of(keys, self.seed), lengths, strips)
        key = visits.draw_key(self.seed, stream, step)
        return keys[visits.take_rows(self._layouts[strips], np.ones(1), lengths, num_tokens, key)].tolist()

    def keys(self) -> list[int]:
        """Keys of all rows held, in the order of insertion."""
        return list(self._lengths)

    def rank_of(self, key: int, world_size: int) -> int:
        """Rank that owns the row, among `world_size` ranks."""
        return int(hashing.owner(int(hashing.shard_of(np.array([key]), self.seed)[0]), world_size))

    def get(self, key: int) -> MemoryRow:
        """The row. Raises KeyError where the buffer does not hold it."""
        return self._rows[key]

    def length(self, key: int) -> int:
        """Tokens of the row."""
        return self._lengths[key][0]

    def num_targets(self, key: int) -> int:
        """Supervised tokens of the row."""
        return self._lengths[key][1]
