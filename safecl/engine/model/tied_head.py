"""Finds a head of its own in a checkpoint whose settings tie the head to the embedding.

A merged adapter that trained the head leaves such a checkpoint. transformers compares the two tensors, and ties them
only where they are equal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from safecl.engine.model.stored_tensors import stored_shapes, stored_tensor
from safecl.engine.model.tensor_names import match_tensors
from safecl.storage.model_folder import has_weights_here, is_converted

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def separate_head(model: PreTrainedModel, path: str) -> tuple[str, str] | None:
    """Return the names of embedding and head in the files where they differ and the model ties them; None elsewhere.

    model: the model that the settings describe, without weights. Files that are not downloaded yet are not read.
    """
    embedding, head = (cast(Any, part) for part in (model.get_input_embeddings(), model.get_output_embeddings()))
    if head is None or head.weight is not embedding.weight or is_converted(path) or not has_weights_here(path):
        return None
    shapes = stored_shapes(path)
    if sum(shape == tuple(embedding.weight.shape) for shape in shapes.values()) < 2:
        return None
    sources = match_tensors(model, shapes, path).sources
    own = [name for name, p in model.named_parameters(remove_duplicate=False) if p is embedding.weight]
    stored = list(dict.fromkeys(sources[name] for name in own if name in sources))
    if len(stored) < 2 or torch.equal(stored_tensor(path, stored[0]), stored_tensor(path, stored[1])):
        return None
    return stored[0], stored[1]
