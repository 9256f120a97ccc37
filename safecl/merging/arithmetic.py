"""Arithmetic that merges share. It works through large tensors in pieces of 4 MiB, so that it takes no memory of their
size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import xxhash

from safecl.config import ConfigError
from safecl.merging.base import Tensors
from safecl.merging.places import Coefficient

PIECE = 2**20
_HIGH_BINS, _LOW_BINS = 2**15, 2**16


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


# ---------------------------------------------------------------------------------------------------------- magnitudes


class Magnitudes:
    """Finds the k-th largest magnitude among fp32 values that come piece by piece, in two passes and without sorting.

    The bits of a non-negative float order as integers do. Pass 0 counts their upper halves, pass 1 the lower halves of
    the values that share the upper half of the k-th largest.
    """

    def __init__(self) -> None:
        self._high = torch.zeros(_HIGH_BINS, dtype=torch.int64)
        self._low = torch.zeros(_LOW_BINS, dtype=torch.int64)
        self.numel = 0

    def count(self, values: torch.Tensor, number: int) -> None:
        """Count a tensor's values in pass 0 or 1; `choose` comes between the two."""
        for (piece,) in pieces(values):
            bits = piece.view(torch.int32) & 0x7FFFFFFF
            if number == 0:
                self._high += torch.bincount(bits >> 16, minlength=_HIGH_BINS)
                self.numel += piece.numel()
            else:
                low = bits[(bits >> 16) == self._bin] & 0xFFFF
                self._low += torch.bincount(low, minlength=_LOW_BINS)

    def choose(self, k: int) -> None:
        """End pass 0."""
        self._k = k
        self._bin, self._above = _bin_of(self._high, k)

    def threshold(self) -> tuple[float, int]:
        """Return the k-th largest magnitude, and how many of the values equal to it are among the k largest."""
        low, above = _bin_of(self._low, self._k - self._above)
        bits = torch.tensor([(self._bin << 16) | low], dtype=torch.int32)
        return float(bits.view(torch.float32)), self._k - self._above - above


def _bin_of(counts: torch.Tensor, k: int) -> tuple[int, int]:
    """Return the bin with the k-th largest value, and the number of values in higher bins."""
    from_the_top = counts.flip(0).cumsum(0)
    index = int(torch.searchsorted(from_the_top, k))
    above = int(from_the_top[index - 1]) if index else 0
    return len(counts) - 1 - index, above


def num_kept(density: float, numel: int) -> int:
    """Number of entries that a density keeps: the integer part of density * numel, and at least 1."""
    return max(1, min(numel, int(density * numel)))


def keep_largest_(values: torch.Tensor, threshold: float, num_equal: int) -> int:
    """Set to zero what is smaller than the threshold in magnitude. Of values equal to it the first `num_equal` stay.
    Return how many of these there were."""
    found = 0
    for (piece,) in pieces(values):
        size = piece.abs()
        kept = size > threshold
        equal = size == threshold
        kept |= equal & (equal.cumsum(0) <= num_equal - found)
        found += min(int(equal.sum()), num_equal - found)
        piece.mul_(kept)
    return found


def trim_(values: torch.Tensor, density: float) -> None:
    """Keep the largest entries of a tensor, and set the others to zero."""
    if density >= 1 or not values.numel():
        return
    magnitudes = Magnitudes()
    magnitudes.count(values, 0)
    magnitudes.choose(num_kept(density, values.numel()))
    magnitudes.count(values, 1)
    keep_largest_(values, *magnitudes.threshold())


# -------------------------------------------------------------------------------------------------------- random drops


def drop_(values: torch.Tensor, density: float, *, seed: int, model: int, name: str) -> None:
    """Keep each entry with probability `density`, and set the others to zero. The draws depend on seed, model, and the
    tensor's name."""
    generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(f"{seed}|{model}|{name}".encode()) >> 1)
    for (piece,) in pieces(values):
        piece.mul_(torch.empty_like(piece).bernoulli_(density, generator=generator))


def l1(values: torch.Tensor) -> float:
    """Sum of magnitudes, in fp64."""
    return sum((float(piece.abs().sum(dtype=torch.float64)) for (piece,) in pieces(values)), 0.0)


# ------------------------------------------------------------------------------------------------------- sign election


def elected_sum_(
    target: torch.Tensor, vectors: Sequence[torch.Tensor], weights: Sequence[float], *, scale: float, normalize: bool
) -> None:
    """Add to `target` the task vectors' entries whose sign is the elected one.

    The elected sign is that of sum_i w_i tau_i, + where the sum is 0. normalize: divide by the sum of the weights of
    the entries that agree.
    """
    for here, *taus in pieces(target, *vectors):
        weighted = [tau * weight for tau, weight in zip(taus, weights, strict=True)]
        elected = (sum(weighted[1:], weighted[0]) >= 0).float().mul_(2).sub_(1)
        total, divisor = torch.zeros_like(here), torch.zeros_like(here)
        for each, weight in zip(weighted, weights, strict=True):
            agrees = each.sign() == elected
            total.add_(each.mul_(agrees))
            divisor.add_(agrees, alpha=weight)
        if normalize:
            total.div_(torch.where(divisor == 0, 1.0, divisor))
        here.add_(total, alpha=scale)
