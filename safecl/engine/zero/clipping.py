"""Clipping of the gradient by its global norm: g * min(1, clip_norm / (||g|| + 1e-6)), as clip_grad_norm_ of torch.

DeepSpeed's own clipping is off. The coefficient enters the fused pass over the shard, which costs no extra pass over
memory. Only a penalty that must be added before that pass needs the gradient clipped in place. update.py decides what
the norm contains (UpdatePlan.clip_scope).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from safecl.engine.zero.shard import Shard


def clip_coefficient(norm: Tensor, clip_norm: float) -> Tensor | None:
    """Return the gradient's factor, 0-dim fp32 in (0, 1]; None where `clip_norm` is 0, which switches clipping off."""
    return torch.clamp(clip_norm / (norm + 1e-6), max=1.0) if clip_norm > 0 else None


def clip_gradients_(shards: Sequence[Shard], coefficient: Tensor) -> None:
    """Multiply the shards' gradients by the coefficient, in place."""
    for shard in shards:
        shard.grad.mul_(coefficient)
