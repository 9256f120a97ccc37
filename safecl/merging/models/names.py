"""The names of tensors in transformers' model, for files that use others: an older version's, or without a prefix."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping

import torch

from safecl.engine.model.structure import empty_model
from safecl.engine.model.tensor_names import match_tensors
from safecl.merging.models.folder import FolderWeights


def names_in_files(weights: FolderWeights) -> Mapping[str, str]:
    """Return {name in the model: name in the files}; empty where transformers does not know the model.

    Leaves out names that share a tensor, as those of a tied head and its embedding do. Makes the model without weights.
    """
    path = os.fspath(weights.folder)
    try:
        sources = match_tensors(empty_model(path, torch.float32), weights.shapes, path).sources
    except (ValueError, OSError, ImportError, KeyError):
        return {}
    uses = Counter(sources.values())
    return {name: stored for name, stored in sources.items() if uses[stored] == 1}
