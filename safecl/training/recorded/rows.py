"""Data sets of rows that are made here and are in no file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from safecl.data import TokenDataset
from safecl.data.tokens import PreparedFile


def dataset_of(tokens: Sequence[np.ndarray], masks: Sequence[np.ndarray], row_ids: np.ndarray) -> TokenDataset:
    """Return these rows as a data set.

    tokens: int32 [length] of each row. masks: bool [length] each, the supervised tokens. row_ids: uint64 [rows].
    """
    lengths = [len(row) for row in tokens]
    arrays = {
        "tokens": np.concatenate(tokens).astype(np.int32),
        "loss_mask": np.concatenate(masks),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]),
        "row_ids": np.asarray(row_ids, np.uint64),
        "num_targets": np.array([int(mask.sum()) for mask in masks], np.int32),
        "lines": np.arange(1, len(tokens) + 1),
        "tags": np.zeros(0, np.uint8),
        "tag_offsets": np.zeros(len(tokens) + 1, np.int64),
    }
    return TokenDataset.from_store(PreparedFile(arrays, path=""))
