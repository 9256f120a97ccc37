"""Measures how well one quantity tells another: correlations over moments, and the area under the curve over prompts.

Pearson's r     Σ (x - x̄)(y - ȳ) / √(Σ (x - x̄)² Σ (y - ȳ)²)
Spearman's rho  Pearson's r of the ranks; ties share their mean rank
AUC             P(score of a hit > score of another) + P(equal) / 2       (Mann and Whitney 1947)
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's correlation; None for fewer than three pairs, or where one side does not vary."""
    n = len(x)
    if n != len(y):
        raise ValueError(f"{n} and {len(y)} values are no pairs")
    if n < 3:
        return None
    mean_x, mean_y = math.fsum(x) / n, math.fsum(y) / n
    spread = math.sqrt(math.fsum((a - mean_x) ** 2 for a in x) * math.fsum((b - mean_y) ** 2 for b in y))
    products = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return max(-1.0, min(1.0, products / spread)) if spread > 0 else None


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None where `pearson` has none."""
    return pearson(_ranks(x), _ranks(y))


def auc(scores: Sequence[float], hits: Sequence[bool]) -> float | None:
    """Probability that a hit has a higher score than another prompt, ties counted half; None without both."""
    ranks = _ranks(scores)
    num_hits = sum(hits)
    num_others = len(hits) - num_hits
    if not num_hits or not num_others:
        return None
    ranks_of_hits = math.fsum(rank for rank, hit in zip(ranks, hits, strict=True) if hit)
    return (ranks_of_hits - num_hits * (num_hits + 1) / 2) / (num_hits * num_others)


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=lambda i: values[i])
    ranks, start = [0.0] * len(values), 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for i in order[start : end + 1]:
            ranks[i] = (start + end) / 2 + 1
        start = end + 1
    return ranks
