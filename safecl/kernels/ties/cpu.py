"""The ties family on the CPU: passes validated tensors to the C++ library (`csrc/ties.cpp`) as raw pointers."""

from __future__ import annotations

from ctypes import byref

import numpy as np
from torch import Tensor

from safecl.kernels import native
from safecl.kernels.ties.arguments import BracketCounts, ElectionArguments


def count_bracket(values: Tensor, minus: Tensor | None, low: float, high: float, between: Tensor) -> BracketCounts:
    call = native.BracketCall(
        numel=values.numel(),
        values=values.data_ptr(),
        minus=None if minus is None else minus.data_ptr(),
        low=_bits(low),
        high=_bits(high),
        between=between.data_ptr(),
        capacity=between.numel(),
    )
    native.library().safecl_bracket(byref(call))
    return BracketCounts(call.num_above, call.num_high, call.num_between, call.num_low)


def elected_sum(call: ElectionArguments) -> list[int]:
    table = (native.TaskVector * len(call.vectors))(
        *(
            native.TaskVector(vector.data_ptr(), weight, _bits(trim.threshold), trim.num_equal)
            for vector, weight, trim in zip(call.vectors, call.weights, call.trims, strict=True)
        )
    )
    arguments = native.ElectionCall(
        numel=call.target.numel(),
        target=call.target.data_ptr(),
        vectors=table,
        num_vectors=len(table),
        subtract=call.subtract,
        normalize=call.normalize,
        half_scale=call.scale / 2,
    )
    native.library().safecl_elect(byref(arguments))
    return [trim.num_equal - row.num_equal for trim, row in zip(call.trims, table, strict=True)]


def _bits(magnitude: float) -> int:
    """Return the bits of a non-negative fp32 number as an integer; these order as the numbers do."""
    return int(np.float32(magnitude).view(np.int32))
