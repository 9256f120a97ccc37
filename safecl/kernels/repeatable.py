"""Sums by index whose order never changes, so that a repeated run has the same bits.

torch's `index_add_` on a GPU uses atomic additions, whose order differs from run to run. `index_put_(accumulate=True)`
sorts the indices first (stable radix sort), then adds the values of each in order.
"""

from __future__ import annotations

from torch import Tensor


def add_at_(total: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Compute total[index[i]] += values[i] for all i, in place, with repeated indices.

    total: [n, ...], index: int64 [m], values: [m, ...] of total's dtype.
    """
    if total.device.type == "cpu":  # adds in the order of the index already
        return total.index_add_(0, index, values)
    return total.index_put_((index,), values, accumulate=True)
