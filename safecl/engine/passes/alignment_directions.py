"""The directions in which an alignment has moved the weights that have adapters."""

from __future__ import annotations

import math
from typing import Any, cast

import torch

from safecl.config import ConfigError, ModelConfig
from safecl.engine.model.adapters import base_model
from safecl.engine.model.dtypes import CONFIG_DTYPES
from safecl.engine.model.structure import empty_model
from safecl.engine.passes.training_engine import TrainingEngine
from safecl.engine.reference.layout import Layout
from safecl.engine.reference.sources import find_weights


@torch.no_grad()
def read_directions(engine: TrainingEngine, base: str, model: ModelConfig) -> dict[str, torch.Tensor]:
    """Return U = V / ||V||_F^(1/2), V = W_aligned - W_base, of every weight that has an adapter: [out, in] in the run's
    dtype on the device, so that U U^T = V V^T / ||V||_F. A weight that the alignment has not moved has U = 0.

    base: folder or hub id of the model before the alignment; the aligned weights are those under the adapters. A
    collective call. Raises ConfigError where a weight has another shape.
    """
    dtype = CONFIG_DTYPES[model.dtype]
    empty = empty_model(base, dtype, trust_remote_code=model.trust_remote_code)
    layout = Layout.of(empty, dtype)
    load = find_weights(base, layout, empty, model.trust_remote_code).loader()
    found = {}
    for name, module in base_model(engine.module.model).named_modules():
        if not getattr(module, "lora_A", {}):
            continue
        key = layout.aliases.get(f"{name}.weight")
        if key is None:
            raise ConfigError(f"{base} has no weight {name}.weight; it must have the aligned model's layers")
        aligned = cast(Any, module).base_layer.weight
        with engine.shards.full_parameter(aligned):
            found[f"{name}.weight"] = _direction(aligned.detach(), load, key, layout.shapes[key], base)
    return found


def _direction(aligned: torch.Tensor, load: Any, key: str, shape: tuple[int, ...], base: str) -> torch.Tensor:
    if tuple(aligned.shape) != shape:
        raise ConfigError(f"{base}: {key} has the shape {list(shape)}, the aligned model's has {list(aligned.shape)}")
    before = torch.empty(math.prod(shape), dtype=aligned.dtype)
    load(key, before)
    moved = aligned.float() - before.view(shape).to(aligned.device).float()
    return (moved / moved.norm().clamp_min(1e-30).sqrt()).to(aligned.dtype)
