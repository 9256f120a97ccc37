"""Looks for values that are NaN or infinite."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK, LONG_CHUNK = 1 << 18, 1 << 28
"""Elements that are looked at together: on a CPU they stay in the cache; a GPU needs longer launches."""


def is_finite(values: Tensor) -> bool:
    """Return whether all values are finite: one read of the tensor, any shape, dtype and device. The host waits."""
    if not values.is_floating_point() or not values.numel():
        return True
    # The extremes of a tensor with NaN are NaN. They need no tensor of booleans, unlike isfinite.
    return all(bool(torch.stack(torch.aminmax(part)).isfinite().all()) for part in _parts(values))


def count_nonfinite(values: Tensor) -> int:
    """Return the number of values that are NaN or infinite."""
    if is_finite(values):
        return 0
    return sum(int((~part.isfinite()).sum()) for part in _parts(values))


def _parts(values: Tensor) -> Iterator[Tensor]:
    flat = values.detach().reshape(-1)
    size = CHUNK if flat.device.type == "cpu" else LONG_CHUNK
    for start in range(0, flat.numel(), size):
        yield flat[start : start + size]
