"""The value that a given share of all weights exceeds."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from safecl.engine.passes.training_engine import TrainingEngine


def upper_threshold(engine: TrainingEngine, kind: str, share: float, chunk: int = 1 << 24) -> float:
    """The smallest value of a state without negative values that at most `share` of all trained weights exceed: exact,
    by two all-reduces.

    The bits of such fp32 numbers are in the order of the numbers: the upper half of the bits is counted first, then,
    among those with the upper half that the threshold has, the lower half.
    """
    allowed = int(share * engine.shards.numel)
    codes = [part for values in engine.optimizer.tensors(kind) for part in values.detach().view(-1).split(chunk)]
    upper, above = _bin_from_top(engine, [_bits(part) >> 16 for part in codes], allowed)
    inside = [bits[(bits >> 16) == upper] & 0xFFFF for bits in map(_bits, codes)]
    lower, _ = _bin_from_top(engine, inside, allowed - above)
    return float(torch.tensor((upper << 16) | lower, dtype=torch.int32).view(torch.float32))


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.float().view(torch.int32).long()


def _bin_from_top(engine: TrainingEngine, codes: Sequence[torch.Tensor], allowed: int) -> tuple[int, int]:
    """(bin, how many are in bins above it): the lowest 16-bit bin with at most `allowed` in the bins above it."""
    counts = sum(
        (torch.bincount(part, minlength=1 << 16).cpu() for part in codes), torch.zeros(1 << 16, dtype=torch.int64)
    )
    above = engine.shards.reduce_sum(counts).flip(0).cumsum(0).flip(0).roll(-1)
    above[-1] = 0
    lowest = int((above <= allowed).nonzero()[0])
    return lowest, int(above[lowest])
