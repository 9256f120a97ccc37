"""The order of examples: a pure function of (seed, step), keyed by row ids.

Inside an epoch rows stand sorted by hash(seed, epoch, row_id), so leaving one row out moves no other; it is cut into
steps by tokens. There is no iterator and no state: any step can be asked for at any time, on any rank, after any
restart, and the answer is the same.
"""

from __future__ import annotations

import functools
import hashlib
import math
from typing import Any

import numpy as np

from safecl.config import TrainConfig
from safecl.data.tokens import TokenDataset

_MAX_AUTO_TOKENS = 65536
_MIN_AUTO_STEPS = 100


def keyed_hash(row_ids: np.ndarray, *key: Any) -> np.ndarray:
    """A pseudo-random uint64 per row id, another for each key: the finaliser of splitmix64 (Steele, Lea, Flood 2014).
    uint64 [N] -> [N]

    It is a bijection of the ids for a fixed key, so that distinct rows never tie.
    """
    salt = int.from_bytes(hashlib.blake2b(":".join(map(str, key)).encode(), digest_size=16).digest(), "little")
    x = row_ids.astype(np.uint64) ^ np.uint64(salt & (2**64 - 1))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    x = (x ^ (x >> np.uint64(31))) ^ np.uint64(salt >> 64)
    for shift, factor in (
        (30, 0xBF58476D1CE4E5B9),
        (27, 0x94D049BB133111EB),
    ):  # a second round: the first key is only xored in
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


class TaskOrder:
    """Which rows each step of a task takes.

    Args: `tokens_per_batch` over all ranks and micro-batches; `epochs` (a fraction is allowed) or `max_steps`. An epoch
    has ceil(tokens / tokens_per_batch) steps of as equal size as the rows allow, instead of full ones and a short last
    one, whose few tokens would weigh as much as a whole step. A step is never empty, and is at most one row longer than
    `tokens_per_batch`.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        seed: int,
        tokens_per_batch: int,
        epochs: float | None = None,
        max_steps: int | None = None,
    ):
        if len(dataset) == 0:
            raise ValueError("a task needs at least one row")
        if tokens_per_batch < 1 or (epochs is None) == (max_steps is None):
            raise ValueError("needs tokens_per_batch >= 1 and either epochs or max_steps")
        self._row_ids, self._lengths, self._seed = dataset.row_ids, dataset.lengths.astype(np.int64), seed
        self.steps_per_epoch = max(1, min(len(dataset), math.ceil(int(self._lengths.sum()) / tokens_per_batch)))
        self.num_steps = max_steps if max_steps is not None else max(1, math.ceil(epochs * self.steps_per_epoch - 1e-9))
        self._cut_epoch = functools.lru_cache(maxsize=2)(self._epoch)

    def epoch_of(self, step: int) -> int:
        """Epoch of a step; both count from 0."""
        return step // self.steps_per_epoch

    def rows_of_step(self, step: int) -> np.ndarray:
        """Indices into the data set. int64 [rows of this step]"""
        if step < 0:
            raise IndexError(f"step {step}")
        order, cuts = self._cut_epoch(self.epoch_of(step))
        k = step % self.steps_per_epoch
        return order[cuts[k] : cuts[k + 1]]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(keyed_hash(self._row_ids, "order", self._seed, epoch), kind="stable")
        return order, _cut(self._lengths[order], self.steps_per_epoch)


def _cut(lengths: np.ndarray, num_steps: int) -> np.ndarray:
    """Bounds of `num_steps` runs of rows, none empty, of about equal token sums. int64 [num_steps + 1]"""
    ends = np.cumsum(lengths)
    # Step k ends with the row that brings the sum to k/num_steps of the epoch's tokens.
    marks = np.arange(1, num_steps, dtype=np.int64) * ends[-1]
    cuts = np.searchsorted(ends * num_steps, marks, side="left") + 1
    # Two marks may fall into one long row: keep at least one row per step, from the front and from the back.
    numbers = np.arange(1, num_steps)
    cuts = np.maximum.accumulate(cuts - numbers) + numbers
    cuts = np.minimum(cuts, len(lengths) - num_steps + numbers)
    return np.concatenate([[0], cuts, [len(lengths)]]).astype(np.int64)


def resolve_tokens_per_batch(train: TrainConfig, dataset: TokenDataset) -> int:
    """`train.tokens_per_batch`, where `auto` is settled by the data: at least 100 steps over the epochs, 65,536 tokens
    at most, one row at least."""
    if train.tokens_per_batch != "auto":
        return train.tokens_per_batch
    num_steps = max(_MIN_AUTO_STEPS, train.max_steps or 0)
    return int(min(_MAX_AUTO_TOKENS, max(int(dataset.lengths.max()), train.epochs * dataset.num_tokens // num_steps)))
