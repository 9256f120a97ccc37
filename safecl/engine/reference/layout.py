"""The places of the reference weights in their segment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Where = Literal["auto", "segment", "file"]

_ALIGNMENT = 256  # bytes: GPU copies and vector units are fast at such addresses


@dataclass(frozen=True)
class Layout:
    """The place of each parameter in the segment; a function of the model alone, so every rank computes it by
    itself."""

    dtype: torch.dtype
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of each parameter, in the model's order; tied parameters occur once."""
    offsets: Mapping[str, int]
    """First byte of each parameter."""
    nbytes: int
    aliases: Mapping[str, str]
    """The stored name for every name of a parameter; tied parameters have several names."""
    buffers: tuple[str, ...]
    """Names of buffers that belong to a checkpoint. They are few and small, and not in the segment."""
    embedding: str
    """Name of the input embedding, whose rows are the vocabulary."""
    prefix: str
    """Prefix of names that a checkpoint of the headless model omits."""

    @classmethod
    def of(cls, model: torch.nn.Module, dtype: torch.dtype) -> Layout:
        """Lay out the parameters of a model, which may be on the meta device."""
        names = {id(p): name for name, p in model.named_parameters()}
        aliases = {name: names[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        offsets, end = {}, 0
        for name, shape in shapes.items():
            offsets[name] = end
            end += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        embedding = names[id(cast("PreTrainedModel", model).get_input_embeddings().weight)]
        buffers = tuple(sorted(set(dict(model.named_buffers())) & set(model.state_dict())))
        return cls(
            dtype, shapes, offsets, max(end, 1), aliases, buffers, embedding, getattr(model, "base_model_prefix", "")
        )

    def num_bytes(self, name: str) -> int:
        return math.prod(self.shapes[name]) * self.dtype.itemsize
