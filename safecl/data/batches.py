"""Rows side by side as tensors.

Packed, documents stand one after the other in one sequence and position ids restart at 0: with attention_mask=None and
use_cache=False transformers builds a block-diagonal causal mask from them, so that no document sees another. Padded,
rows are filled up at the right: a causal model never looks there, so no attention mask is needed either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from safecl.data.tokens import Row

IGNORE = -100


@dataclass
class MicroBatch:
    """input_ids, position_ids: long [B, S]. targets: long [B * S], the next token, -100 for none.

    starts: flat index of each row's first token in B * S; lengths: tokens of each row. The target that is token j >= 1
    of row r stands at flat index starts[r] + j - 1.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    targets: torch.Tensor
    starts: list[int]
    lengths: list[int]

    @property
    def num_targets(self) -> int:
        return int((self.targets != IGNORE).sum())


def collate(rows: Sequence[Row], *, packed: bool, pad_id: int) -> MicroBatch:
    """Rows as one micro-batch: packed [1, total tokens] or padded [rows, longest].

    No rows give a dummy of two tokens without targets, so that a rank with nothing to do takes part in every
    collective.
    """
    lengths = [len(row) for row in rows]
    if not rows:
        shape, starts = (1, 2), []
    elif packed:
        shape, starts = (1, sum(lengths)), [0, *np.cumsum(lengths)[:-1].tolist()]
    else:
        shape, starts = (len(rows), max(lengths)), [r * max(lengths) for r in range(len(rows))]
    ids = np.full(shape[0] * shape[1], pad_id, np.int64)
    positions = np.tile(np.arange(shape[1], dtype=np.int64), shape[0])
    targets = np.full(shape[0] * shape[1], IGNORE, np.int64)
    for row, start, length in zip(rows, starts, lengths, strict=True):
        ids[start : start + length] = row.input_ids
        positions[start : start + length] = np.arange(length)
        targets[start : start + length - 1] = np.where(row.loss_mask[1:], row.input_ids[1:], IGNORE)
    return MicroBatch(
        torch.from_numpy(ids).view(shape),
        torch.from_numpy(positions).view(shape),
        torch.from_numpy(targets),
        starts,
        lengths,
    )
