"""The ties family in plain torch: the definition of the C++ kernels, and the fallback where these do not run.

It works in chunks of 1 MiB, which stay in a core's cache, in memory that is taken once: fresh pages take longer than
the arithmetic. Masks are fp32 numbers, 0 and 1: torch compares into fp32 five times as fast as into bool. The
operations have the order of the kernels, so the elements agree bitwise where torch's `add` fuses the multiplication by
`alpha`, as it does with AVX2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from safecl.kernels.ties.arguments import BracketCounts, ElectionArguments, Trim

CHUNK = 2**18
"""Elements of a chunk."""


def count_bracket(values: Tensor, minus: Tensor | None, low: float, high: float, between: Tensor) -> BracketCounts:
    num_above = num_high = num_between = num_low = 0
    for (part, *others), (sizes, mask, work) in _chunks([values] if minus is None else [values, minus], 3):
        _difference(part, others[0] if others else None, sizes).abs_()
        above = _count(torch.gt(sizes, high, out=mask))
        from_high = _count(torch.ge(sizes, high, out=mask))
        from_low = _count(torch.ge(sizes, low, out=mask))
        inside = torch.gt(sizes, low, out=mask).mul_(torch.lt(sizes, high, out=work)).nonzero().view(-1)
        room = between[num_between : num_between + len(inside)]
        torch.index_select(sizes, 0, inside[: len(room)], out=room)
        num_above, num_high = num_above + above, num_high + from_high - above
        num_between, num_low = num_between + len(inside), num_low + from_low - from_high - len(inside)
    return BracketCounts(num_above, num_high, num_between, num_low)


def elected_sum(call: ElectionArguments) -> list[int]:
    kept = [0] * len(call.vectors)
    for (target, *vectors), (tau, sums, sizes, positive, negative, work) in _chunks([call.target, *call.vectors], 6):
        for buffer in (sums, sizes, positive, negative):
            buffer.zero_()
        for index, (vector, weight, trim) in enumerate(zip(vectors, call.weights, call.trims, strict=True)):
            _difference(vector, target if call.subtract else None, tau)
            kept[index] += _trim(tau, trim._replace(num_equal=trim.num_equal - kept[index]), work)
            sums.add_(tau.mul_(weight))
            sizes.add_(torch.abs(tau, out=work))
            if call.normalize:
                positive.add_(torch.gt(tau, 0, out=work), alpha=weight)
                negative.add_(torch.lt(tau, 0, out=work), alpha=weight)
        sizes.add_(torch.abs(sums, out=work))
        plus = torch.ge(sums, 0, out=sums)
        if call.normalize:
            divisor = negative.lerp_(positive, plus)  # exact where the weight is 0 or 1
            sizes.div_(divisor.add_(torch.eq(divisor, 0, out=work)))
        target.add_(sizes.mul_(plus.mul_(2).sub_(1)), alpha=call.scale / 2)
    return kept


def _difference(values: Tensor, minus: Tensor | None, out: Tensor) -> Tensor:
    return out.copy_(values) if minus is None else torch.sub(values, minus, out=out)


def _trim(tau: Tensor, trim: Trim, work: Tensor) -> int:
    """Set to 0 what a chunk of a task vector loses; return how many magnitudes equal to the threshold it keeps."""
    if trim.threshold == 0:
        return 0
    equal = torch.eq(torch.abs(tau, out=work), trim.threshold, out=work).nonzero().view(-1)
    below = float(np.nextafter(np.float32(trim.threshold), np.float32(0)))
    torch.hardshrink(tau, below, out=tau)
    tau[equal[trim.num_equal :]] = 0
    return min(len(equal), trim.num_equal)


def _count(mask: Tensor) -> int:
    return int(mask.sum())


def _chunks(tensors: Sequence[Tensor], num_buffers: int) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield views of the same elements of all tensors, flat, and buffers of their length."""
    flat = [tensor.view(-1) for tensor in tensors]
    buffers = [torch.empty_like(flat[0][:CHUNK]) for _ in range(num_buffers)]
    for start in range(0, flat[0].numel(), CHUNK):
        parts = [each[start : start + CHUNK] for each in flat]
        yield parts, [buffer[: len(parts[0])] for buffer in buffers]
