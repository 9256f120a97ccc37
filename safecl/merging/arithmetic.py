"""Arithmetic that merges share.

It works through large tensors in pieces of 1 MiB, which stay in a core's cache and take no memory of the tensors'
size. Masks are fp32 numbers, 0 and 1: torch compares into fp32 five times as fast as into bool, and chooses by bool
(`where`, `masked_fill`) 20 times slower than it multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import xxhash

from safecl.config import ConfigError
from safecl.kernels import Trim, count_bracket
from safecl.merging.base import Tensors
from safecl.merging.places import Coefficient

PIECE = 2**18
"""Elements of a piece."""
_HIGH_BINS, _LOW_BINS = 2**15, 2**16
_FEWEST_SAMPLES, _MOST_SAMPLES = 2**14, 2**18
_FEWEST_BETWEEN, _MOST_BETWEEN = 2**16, 2**22


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

    def threshold(self) -> Trim:
        """Return the k-th largest magnitude, and how many of the values equal to it are among the k largest."""
        low = _bin_of(self._low[1:], self._k)
        bits = torch.tensor([(self._half << 16) | low], dtype=torch.int32)
        return Trim(float(bits.view(torch.float32)), self._k - int(self._low[low + 2 :].sum()))


def _bin_of(counts: torch.Tensor, k: int) -> int:
    """Return the bin with the k-th largest value."""
    return len(counts) - 1 - int(torch.searchsorted(counts.flip(0).cumsum(0), k))


def num_kept(density: float, numel: int) -> int:
    """Number of entries that a density keeps: the integer part of density * numel, and at least 1."""
    return max(1, min(numel, int(density * numel)))


def kth_largest(values: torch.Tensor, k: int, minus: torch.Tensor | None = None) -> Trim:
    """Return the k-th largest of the magnitudes |values - minus|, or |values|, and how many of those equal to it are
    among the k largest.

    A sample gives a bracket, and one pass picks out the magnitudes between. Where the k-th largest is not among these,
    or they are too many, two more passes count all.
    """
    values, minus = values.view(-1), None if minus is None else minus.view(-1)
    low, high = _bracket(values, minus, k)
    numel = values.numel()
    between = torch.empty(min(numel, max(numel // 16, _FEWEST_BETWEEN), _MOST_BETWEEN))
    counts = count_bracket(values, low, high, between, minus=minus)
    place = k - counts.num_above
    if 0 < place <= counts.num_high:
        return Trim(high, place)
    place -= counts.num_high
    if 0 < place <= counts.num_between <= len(between):
        found = between[: counts.num_between]
        threshold = float(found.kthvalue(len(found) + 1 - place).values)
        return Trim(threshold, place - int((found > threshold).sum()))
    place -= counts.num_between
    return Trim(low, place) if 0 < place <= counts.num_low else _kth_largest_by_counts(values, k, minus)


def _bracket(values: torch.Tensor, minus: torch.Tensor | None, k: int) -> tuple[float, float]:
    """Return magnitudes a little smaller and a little larger than the k-th largest, by a sample."""
    numel = values.numel()
    num_samples = min(max(numel // 256, _FEWEST_SAMPLES), _MOST_SAMPLES)
    step = max(1, numel // num_samples) | 1  # odd, or the sample could be one column of a matrix
    sample = values[::step] if minus is None else values[::step] - minus[::step]
    sizes = sample.abs().numpy()
    share = k / numel
    place, margin = share * len(sizes), 4 * math.sqrt(share * (1 - share) * len(sizes)) + 4  # four standard deviations
    low, high = len(sizes) - 1 - math.ceil(place + margin), len(sizes) - 1 - math.floor(place - margin)
    ordered = np.partition(sizes, [max(low, 0), min(high, len(sizes) - 1)])
    return float(ordered[low]) if low >= 0 else 0.0, float(ordered[high]) if high < len(sizes) else math.inf


def _kth_largest_by_counts(values: torch.Tensor, k: int, minus: torch.Tensor | None) -> Trim:
    magnitudes = Magnitudes()
    for number in range(2):
        for part, *others in pieces(*([values] if minus is None else [values, minus])):
            magnitudes.count(part - others[0] if others else part, number)
        if number == 0:
            magnitudes.choose(k)
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
