"""The value that a given share of all weights exceeds."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from safecl.engine.passes.training_engine import TrainingEngine


def upper_threshold(engine: TrainingEngine, kind: str, share: float, chunk: int = 1 << 24) -> float:
    """Return the smallest value of a non-negative state that at most `share` of all trained weights exceed.

    It is exact, takes two all-reduces, and works on chunks, whose counts are all that is kept. The bits of non-negative
    fp32 numbers, read as integers, have the order of the numbers. The first all-reduce finds the threshold's upper 16
    bits, the second its lower 16 bits among the numbers with these upper bits.
    """
    allowed = int(share * engine.shards.numel)
    parts = [part for values in engine.optimizer.tensors(kind) for part in values.detach().view(-1).split(chunk)]
    upper, above = _bin_from_top(engine, (_bits(part) >> 16 for part in parts), allowed)
    inside = (bits[(bits >> 16) == upper] & 0xFFFF for bits in map(_bits, parts))
    lower, _ = _bin_from_top(engine, inside, allowed - above)
    return float(torch.tensor((upper << 16) | lower, dtype=torch.int32).view(torch.float32))


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.float().view(torch.int32)


def _bin_from_top(engine: TrainingEngine, codes: Iterator[torch.Tensor], allowed: int) -> tuple[int, int]:
    """Find the lowest 16-bit bin with at most `allowed` codes in the bins above it. Return (bin, codes above it)."""
    counts = sum(
        (torch.bincount(part, minlength=1 << 16).cpu() for part in codes), torch.zeros(1 << 16, dtype=torch.int64)
    )
    above = engine.shards.reduce_sum(counts).flip(0).cumsum(0).flip(0).roll(-1)
    above[-1] = 0
    lowest = int((above <= allowed).nonzero()[0])
    return lowest, int(above[lowest])
