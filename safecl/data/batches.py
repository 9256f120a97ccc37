"""A micro-batch of rows as tensors, packed or padded.

Packed: the documents follow each other in one sequence, and the position ids restart at 0 for each. With
attention_mask=None and use_cache=False, transformers builds a block-diagonal causal mask from these ids, so that no
document attends to another.

Padded: rows are filled up on the right. A causal model never attends to later tokens, so no attention mask is needed.
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
    """The tensors of one micro-batch of B sequences of S tokens.

    input_ids, position_ids: long [B, S]. targets: long [B * S], the next token, -100 for none.
    starts: flat index in [B * S] of each row's first token. lengths: tokens of each row.
    Token j >= 1 of row r is the target at flat index starts[r] + j - 1.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    targets: torch.Tensor
    starts: list[int]
    lengths: list[int]

    @property
    def bounds(self) -> torch.Tensor:
        """int32 [documents + 1]: the flat index at which each document begins, and the end. Padding belongs to its
        row's document."""
        rows, length = self.input_ids.shape
        begins = self.starts if rows == 1 and self.starts else [row * length for row in range(rows)]
        return torch.tensor([*begins, rows * length], dtype=torch.int32)

    @property
    def num_targets(self) -> int:
        return int((self.targets != IGNORE).sum())


def collate(rows: Sequence[Row], *, packed: bool, pad_id: int) -> MicroBatch:
    """Put rows into one micro-batch: packed [1, total tokens], or padded [rows, longest].

    Without rows the result is a dummy of two tokens without targets, so that a rank with nothing to do still takes part
    in every collective.
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
