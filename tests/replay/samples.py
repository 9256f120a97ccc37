"""Rows and buffers for the tests of this room."""

from __future__ import annotations

from typing import Any

import numpy as np

from safecl.config import MemoryConfig
from safecl.data import Row
from safecl.replay import MemoryRow, ReplayBuffer, TeacherOutputs


def config(**settings: Any) -> MemoryConfig:
    return MemoryConfig(source="memory.jsonl", **settings)


def token_row(number: int, length: int | None = None, **fields: Any) -> MemoryRow:
    """A row whose tokens, mask and length follow from its number."""
    random = np.random.default_rng(number)
    length = int(random.integers(4, 60)) if length is None else length
    ids = random.integers(0, 32000, length).astype(np.int32)
    mask = random.random(length) < 0.5
    mask[0] = False
    if length > 1:
        mask[-1] = True
    return MemoryRow(Row(number, ids, mask), source="memory.jsonl", task="safety", step=number % 7, **fields)


def rows(count: int, first: int = 0, **fields: Any) -> list[MemoryRow]:
    return [token_row(first + i, **fields) for i in range(count)]


def with_teacher(row: MemoryRow, k: int = 8, vocab: int = 32000) -> MemoryRow:
    """The same row with made-up top-k outputs."""
    random = np.random.default_rng(row.row.row_id + 10**6)
    targets = row.row.num_targets
    log_probs = -np.sort(random.exponential(2.0, (targets, k)), axis=1).astype(np.float16)
    indices = np.array([random.choice(vocab, k, replace=False) for _ in range(targets)], np.int32).reshape(targets, k)
    outputs = TeacherOutputs(log_probs, indices, -random.exponential(1.0, targets).astype(np.float32))
    return MemoryRow(row.row, row.source, row.task, row.step, row.tags, outputs)


def same_row(a: MemoryRow, b: MemoryRow) -> bool:
    """True where ids, mask, labels, tags and outputs are equal bit by bit."""
    same = (
        a.row.row_id == b.row.row_id
        and np.array_equal(a.row.input_ids, b.row.input_ids)
        and np.array_equal(a.row.loss_mask, b.row.loss_mask)
    )
    same = same and (a.source, a.task, a.step, dict(a.tags)) == (b.source, b.task, b.step, dict(b.tags))
    if (a.teacher is None) != (b.teacher is None):
        return False
    if a.teacher is None:
        return same
    pairs = zip(vars(a.teacher).values(), vars(b.teacher).values(), strict=True)
    return same and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


def tokens_of(buffer: ReplayBuffer, keys: list[int]) -> int:
    return int(buffer.lengths(keys).sum())
