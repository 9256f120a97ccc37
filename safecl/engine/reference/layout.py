"""How the reference weights lie in their segment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

Where = Literal["auto", "segment", "file"]


_ALIGNMENT = 256  # of each tensor in the segment: what GPU copies and vector units like


@dataclass(frozen=True)
class Layout:
    """Where each parameter of a model lies in the segment; a function of the model alone, so every rank works it out by
    itself."""

    dtype: torch.dtype
    shapes: Mapping[str, tuple[int, ...]]
    """Of each parameter, tied ones once, in the model's order."""
    offsets: Mapping[str, int]
    """First byte of each parameter."""
    nbytes: int
    aliases: Mapping[str, str]
    """Every name, that of a tied parameter too, to the name that it is kept under."""
    buffers: tuple[str, ...]
    """Names of buffers that belong to a checkpoint; few and small, so they are not in the segment."""
    embedding: str
    """Name of the input embedding, whose rows are the vocabulary."""
    prefix: str
    """Of names that a checkpoint of the headless model leaves out."""

    @classmethod
    def of(cls, model: torch.nn.Module, dtype: torch.dtype) -> Layout:
        names = {id(p): name for name, p in model.named_parameters()}
        aliases = {name: names[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        offsets, end = {}, 0
        for name, shape in shapes.items():
            offsets[name] = end
            end += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        embedding = names[id(model.get_input_embeddings().weight)]
        buffers = tuple(sorted(set(dict(model.named_buffers())) & set(model.state_dict())))
        return cls(
            dtype, shapes, offsets, max(end, 1), aliases, buffers, embedding, getattr(model, "base_model_prefix", "")
        )

    def num_bytes(self, name: str) -> int:
        return math.prod(self.shapes[name]) * self.dtype.itemsize
