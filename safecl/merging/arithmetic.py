"""Arithmetic that merges share.

It works through large tensors in pieces of 1 MiB, which stay in a core's cache and take no memory of the tensors'
size. Masks are fp32 numbers, 0 and 1, or numpy's bool: torch compares into fp32 five times as fast as into bool, and
chooses by bool (`where`, `masked_fill`) 20 times slower than it multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import xxhash

from safecl.config import ConfigError
from safecl.merging.base import Tensors
from safecl.merging.places import Coefficient

PIECE = 2**18
"""Elements of a piece."""
_HIGH_BINS, _LOW_BINS = 2**15, 2**16
_NUM_SAMPLES = 2**14


def pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield views of the same elements of contiguous tensors of one shape, as flat pieces."""
    flat = [tensor.view(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), PIECE):
        yield tuple(each[start : start + PIECE] for each in flat)


def check_weights(kind: str, weights: Sequence[Coefficient] | None, count: int, models: str) -> None:
    """Raise ConfigError where there are not as many weights as models. models: which ones, for the message."""
    if weights is not None and len(weights) != count:
        raise ConfigError(f"{kind}.weights: {len(weights)} values for {count} models ({models})")


def weights_at(weights: Sequence[Coefficient] | None, tensors: Tensors, count: int) -> list[float]:
    """Return the weight of each model for a tensor; 1 without weights."""
    return [1.0] * count if weights is None else [tensors.value(weight) for weight in weights]


def weighted_sum_(values: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return sum_i w_i v_i in the memory of the first."""
    total = values[0].mul_(weights[0])
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total.add_(value, alpha=weight)
    return total


def dot(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the dot product of two tensors, summed in fp64."""
    return sum((float(torch.dot(x.double(), y.double())) for x, y in pieces(a, b)), 0.0)


def dots(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float, float]:
    """Return the dot products <a, a>, <b, b> and <a, b> of two tensors, summed in fp64."""
    own = other = both = 0.0
    for x, y in ((x.double(), y.double()) for x, y in pieces(a, b)):
        own, other, both = own + float(x.dot(x)), other + float(y.dot(y)), both + float(x.dot(y))
    return own, other, both


def where_greater_(values: torch.Tensor, others: torch.Tensor) -> None:
    """Replace the values whose magnitude is below that of the other tensor's element by that element."""
    for mine, other in pieces(values, others):
        size = other.abs()
        torch.gt(size, mine.abs(), out=size)
        mine.lerp_(other, size)  # exact where the weight is 0 or 1


# ---------------------------------------------------------------------------------------------------------- magnitudes


class Magnitudes:
    """Finds the k-th largest magnitude among fp32 values that come piece by piece, in two passes and without sorting.

    The bits of a non-negative float order as integers do. Pass 0 counts their upper halves, pass 1 the lower halves of
    the values that share the upper half of the k-th largest.
    """

    def __init__(self) -> None:
        self._high = torch.zeros(_HIGH_BINS, dtype=torch.int64)
        self._low = torch.zeros(
            _LOW_BINS + 2, dtype=torch.int64
        )  # the first bin is for all smaller, the last for larger
        self.numel = 0

    def count(self, values: torch.Tensor, number: int) -> None:
        """Count a tensor's values in pass 0 or 1; `choose` comes between the two."""
        for (piece,) in pieces(values):
            bits = piece.view(torch.int32) & 0x7FFFFFFF
            if number == 0:
                self._high += torch.bincount(bits.bitwise_right_shift_(16), minlength=_HIGH_BINS)
                self.numel += piece.numel()
            else:
                low = bits.sub_(self._half << 16).clamp_(-1, _LOW_BINS).add_(1)
                self._low += torch.bincount(low, minlength=_LOW_BINS + 2)

    def choose(self, k: int) -> None:
        """End pass 0."""
        self._k = k
        self._half = _bin_of(self._high, k)

    def threshold(self) -> tuple[float, int]:
        """Return the k-th largest magnitude, and how many of the values equal to it are among the k largest."""
        low = _bin_of(self._low[1:], self._k)
        bits = torch.tensor([(self._half << 16) | low], dtype=torch.int32)
        return float(bits.view(torch.float32)), self._k - int(self._low[low + 2 :].sum())


def _bin_of(counts: torch.Tensor, k: int) -> int:
    """Return the bin with the k-th largest value."""
    return len(counts) - 1 - int(torch.searchsorted(counts.flip(0).cumsum(0), k))


def num_kept(density: float, numel: int) -> int:
    """Number of entries that a density keeps: the integer part of density * numel, and at least 1."""
    return max(1, min(numel, int(density * numel)))


def keep_largest_(values: torch.Tensor, threshold: float, num_equal: int) -> int:
    """Set to zero what is smaller than the threshold in magnitude. Of values equal to it the first `num_equal` stay.
    Return how many of these there were."""
    if threshold == 0:
        return 0
    left = num_equal
    below = float(np.nextafter(np.float32(threshold), np.float32(0)))
    sizes, mask = _work(values)
    for (piece,) in pieces(values):
        torch.abs(piece, out=sizes[: len(piece)])
        equal = np.flatnonzero(np.equal(sizes[: len(piece)].numpy(), np.float32(threshold), out=mask[: len(piece)]))
        torch.hardshrink(piece, below, out=piece)
        piece.numpy()[equal[left:]] = 0
        left -= min(len(equal), left)
    return num_equal - left


def _work(values: torch.Tensor) -> tuple[torch.Tensor, np.ndarray[Any, np.dtype[np.bool_]]]:
    """Return room for the magnitudes of a piece, and for a mask. Fresh memory for each piece costs page faults, which
    take longer than the arithmetic."""
    numel = min(PIECE, values.numel())
    return torch.empty(numel), np.empty(numel, bool)


def trim_(values: torch.Tensor, density: float) -> None:
    """Keep the largest entries of a tensor, and set the others to zero."""
    if density < 1 and values.numel():
        keep_largest_(values, *kth_largest(values, num_kept(density, values.numel())))


def kth_largest(values: torch.Tensor, k: int) -> tuple[float, int]:
    """Return the k-th largest magnitude, and how many of the values equal to it are among the k largest.

    A sample gives brackets, and one pass picks out the values between them. Where the k-th largest is not among these,
    two more passes count all values.
    """
    low, high = _brackets(values, k)
    num_above, parts = 0, []
    room, mask = _work(values)
    for (piece,) in pieces(values):
        sizes = torch.abs(piece, out=room[: len(piece)]).numpy()
        above = np.greater(sizes, high, out=mask[: len(piece)])
        num_above += np.count_nonzero(above)
        places = np.flatnonzero(np.less(above, sizes >= low))  # a mask would be three times slower
        parts.append(sizes.take(places))
    between = torch.from_numpy(np.concatenate(parts))
    place = k - num_above
    if not 0 < place <= len(between):
        return _kth_largest_by_counts(values, k)
    threshold = float(between.kthvalue(len(between) + 1 - place).values)
    return threshold, place - int((between > threshold).sum())


def _brackets(values: torch.Tensor, k: int) -> tuple[np.float32, np.float32]:
    """Return magnitudes a little smaller and a little larger than the k-th largest, by a sample."""
    step = max(1, values.numel() // _NUM_SAMPLES) | 1  # odd, or the sample could be one column of a matrix
    sample = np.sort(values.view(-1)[::step].abs().numpy())[::-1]
    place = k / values.numel() * len(sample)
    margin = 4 * math.sqrt(place) + 4  # more than four standard deviations
    low, high = math.ceil(place + margin), math.floor(place - margin)
    return (
        sample[low] if low < len(sample) else np.float32(0),
        sample[high] if high >= 0 else np.float32(math.inf),
    )


def _kth_largest_by_counts(values: torch.Tensor, k: int) -> tuple[float, int]:
    magnitudes = Magnitudes()
    magnitudes.count(values, 0)
    magnitudes.choose(k)
    magnitudes.count(values, 1)
    return magnitudes.threshold()


# -------------------------------------------------------------------------------------------------------- random drops


def drop_(values: torch.Tensor, density: float, *, seed: int, model: int, name: str) -> None:
    """Keep each entry with probability `density`, and set the others to zero. The draws depend on seed, model, and the
    tensor's name: 32 bits of numpy's SFC64 each, a stream that numpy keeps from version to version."""
    if density >= 1:
        return
    source = np.random.SFC64(xxhash.xxh3_64_intdigest(f"{seed}|{model}|{name}".encode()))
    limit = round(density * 2**32) - 2**31
    for (piece,) in pieces(values):
        draws = torch.from_numpy(source.random_raw((piece.numel() + 1) // 2).view(np.int32)[: piece.numel()])
        piece.mul_(torch.lt(draws, limit, out=torch.empty_like(piece)))


def l1(values: torch.Tensor) -> float:
    """Sum of magnitudes, in fp64."""
    return sum((float(piece.abs().sum(dtype=torch.float64)) for (piece,) in pieces(values)), 0.0)


# ------------------------------------------------------------------------------------------------------- sign election


def elected_sum_(
    target: torch.Tensor, vectors: Sequence[torch.Tensor], weights: Sequence[float], *, scale: float, normalize: bool
) -> None:
    """Add to `target` the task vectors' entries whose sign is the elected one. The vectors' memory is used.

    The elected sign s is that of sum_i w_i tau_i, + where the sum is 0. The entries that agree have the sum
    s (sum_i |w_i tau_i| + |sum_i w_i tau_i|) / 2. normalize: divide by the sum of their weights.
    """
    buffers = [torch.empty(min(PIECE, target.numel())) for _ in range(4)]
    for here, *taus in pieces(target, *vectors):
        total, sizes, divisor, work = (buffer[: len(here)] for buffer in buffers)
        for tau, weight in zip(taus, weights, strict=True):
            if weight != 1:
                tau.mul_(weight)
        total.copy_(taus[0])
        torch.abs(taus[0], out=sizes)
        for tau in taus[1:]:
            total.add_(tau)
            sizes.add_(torch.abs(tau, out=work))
        sizes.add_(torch.abs(total, out=work))
        sign = torch.ge(total, 0, out=total).mul_(2).sub_(1)
        if normalize:
            divisor.zero_()
            for tau, weight in zip(taus, weights, strict=True):
                agrees = torch.gt(torch.mul(tau, sign, out=work), 0, out=work)
                divisor.add_(agrees, alpha=weight)
            sizes.div_(divisor.add_(torch.eq(divisor, 0, out=work)))
        here.add_(sizes.mul_(sign), alpha=scale / 2)
