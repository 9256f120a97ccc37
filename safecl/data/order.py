"""The order of examples: a pure function of (seed, step), keyed by row ids.

An epoch is the rows sorted by hash(seed, epoch, row_id), so that leaving one row out moves no other, cut into steps by
tokens. There is no iterator and no state: every rank gets the same rows of a step at any time, also after a restart.
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
    """Hash row ids with a key, by the finaliser of splitmix64 (Steele, Lea, Flood 2014). uint64 [N] -> [N]

    For a fixed key it is a bijection of the ids, so that distinct rows never tie.
    """
    salt = int.from_bytes(hashlib.blake2b(":".join(map(str, key)).encode(), digest_size=16).digest(), "little")
    x = row_ids.astype(np.uint64) ^ np.uint64(salt & (2**64 - 1))
    x = _mix(x) ^ np.uint64(salt >> 64)
    return _mix(x)  # a second round, since the first key is only xored in


def _mix(x: np.ndarray) -> np.ndarray:
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


class TaskOrder:
    """The rows of each step of a task.

    An epoch has ceil(tokens / tokens_per_batch) steps of about equal size. Full steps and a short last one would give
    the few tokens of that last step the weight of a whole step. A step is never empty, and is at most one row longer
    than `tokens_per_batch`.

    Args: `tokens_per_batch` over all ranks and micro-batches; `epochs` (a fraction is allowed) or `max_steps`.
    Raises: ValueError for no rows, or arguments that contradict each other.
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
        self.num_steps = max_steps or 0
        if epochs is not None:
            self.num_steps = max(1, math.ceil(epochs * self.steps_per_epoch - 1e-9))
        self._cut_epoch = functools.lru_cache(maxsize=2)(self._epoch)

    def epoch_of(self, step: int) -> int:
        """Return the epoch of a step; both count from 0."""
        return step // self.steps_per_epoch

    def rows_of_step(self, step: int) -> np.ndarray:
        """Return a step's rows as indices into the data set. int64 [rows of this step]"""
        if step < 0:
            raise IndexError(f"step {step}")
        order, cuts = self._cut_epoch(self.epoch_of(step))
        k = step % self.steps_per_epoch
        return order[cuts[k] : cuts[k + 1]]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(keyed_hash(self._row_ids, "order", self._seed, epoch), kind="stable")
        return order, _cut(self._lengths[order], self.steps_per_epoch)


def _cut(lengths: np.ndarray, num_steps: int) -> np.ndarray:
    """Return the bounds of `num_steps` runs of rows, none empty, with about equal token sums. int64 [num_steps + 1]"""
    ends = np.cumsum(lengths)
    # Step k ends with the row that brings the sum to k/num_steps of the epoch's tokens.
    marks = np.arange(1, num_steps, dtype=np.int64) * ends[-1]
    cuts = np.searchsorted(ends * num_steps, marks, side="left") + 1
    # Two marks may fall into one long row. Keep at least one row per step, from the front and from the back.
    numbers = np.arange(1, num_steps)
    cuts = np.maximum.accumulate(cuts - numbers) + numbers
    cuts = np.minimum(cuts, len(lengths) - num_steps + numbers)
    return np.concatenate([[0], cuts, [len(lengths)]]).astype(np.int64)


def resolve_tokens_per_batch(train: TrainConfig, dataset: TokenDataset) -> int:
    """Return `train.tokens_per_batch`, with `auto` replaced by a number that fits the data.

    `auto` gives at least 100 steps over the epochs, at most 65,536 tokens, and at least one row a step.
    """
    if train.tokens_per_batch != "auto":
        return train.tokens_per_batch
    num_steps = max(_MIN_AUTO_STEPS, train.max_steps or 0)
    return int(min(_MAX_AUTO_TOKENS, max(int(dataset.lengths.max()), train.epochs * dataset.num_tokens // num_steps)))
