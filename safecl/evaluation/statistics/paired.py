"""Two models on the same prompts: the difference of their rates with an interval, exact tests, Holm's correction.

Of n prompts, a are hits of both models, b of the second alone, c of the first alone, d of neither. With
p1 = (a + c) / n, p2 = (a + b) / n and their Wilson intervals [l1, u1], [l2, u2]:

    rise = p2 - p1 = (b - c) / n
    low  = rise - sqrt((p2 - l2)^2 - 2 phi (p2 - l2) (u1 - p1) + (u1 - p1)^2)
    high = rise + sqrt((u2 - p2)^2 - 2 phi (u2 - p2) (p1 - l1) + (p1 - l1)^2)

with phi = C / sqrt((a + b) (c + d) (a + c) (b + d)), 0 where the root is 0, and C = ad - bc - n/2 but at least 0 where
ad > bc, else ad - bc                                    Newcombe 1998, Statistics in Medicine 17, 2635, method 10

Sign test of integer differences d_i (McNemar's exact test where they are -1, 0, 1): under the null hypothesis each sign
is a fair coin, and p is the share of the 2^n sign patterns whose sum is at least as far from 0 as the one observed. The
distribution of the sum is a product of polynomials, so it is computed and not sampled.

Holm 1979: of m p-values in rising order, the adjusted k-th is the largest of (m - j + 1) p_(j) over j <= k, at most 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator

from safecl.evaluation.statistics.intervals import wilson


@dataclass(frozen=True)
class Rise:
    """The difference of two rates on the same `n` prompts with its 95 % interval, all in [-1, 1].

    gained: prompts that became hits; lost: prompts that were hits and are none now. undecided: prompts without an
    outcome in one of the models, part of `n`; the interval holds whatever they are. The value is over the others, NaN
    where there are none.
    """

    value: Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
    low: float
    high: float
    n: int
    gained: int
    lost: int
    undecided: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for results.json."""
        value = self.value if math.isfinite(self.value) else None
        undecided = {"undecided": self.undecided} if self.undecided else {}
        plain = {"value": value, "low": self.low, "high": self.high, "n": self.n}
        return plain | {"gained": self.gained, "lost": self.lost} | undecided


def rise(before: Sequence[bool | None], after: Sequence[bool | None]) -> Rise:
    """Compute the rise of a rate from the outcomes of the same prompts in two models; None is an undecided outcome.
    ValueError without outcomes, or where the numbers differ."""
    if len(before) != len(after) or not before:
        raise ValueError(f"a rise needs the same prompts twice: {len(before)} and {len(after)} outcomes")
    pairs = list(zip(before, after, strict=True))
    decided = [(was, now) for was, now in pairs if was is not None and now is not None]
    low = newcombe([(was is None or was, bool(now)) for was, now in pairs])[0]
    high = newcombe([(bool(was), now is None or now) for was, now in pairs])[1]
    gained, lost = sum(now and not was for was, now in decided), sum(was and not now for was, now in decided)
    value = (gained - lost) / len(decided) if decided else math.nan
    return Rise(value, low, high, len(pairs), gained, lost, len(pairs) - len(decided))


def newcombe(pairs: Sequence[tuple[bool, bool]]) -> tuple[float, float]:
    """95 % interval of the difference of two paired rates, second minus first; within [-1, 1]."""
    n = len(pairs)
    a, b = sum(was and now for was, now in pairs), sum(now and not was for was, now in pairs)
    c = sum(was and not now for was, now in pairs)
    d = n - a - b - c
    (l1, u1), (l2, u2) = wilson(a + c, n), wilson(a + b, n)
    p1, p2, phi = (a + c) / n, (a + b) / n, _phi(a, b, c, d)
    down = (p2 - l2) ** 2 - 2 * phi * (p2 - l2) * (u1 - p1) + (u1 - p1) ** 2
    up = (u2 - p2) ** 2 - 2 * phi * (u2 - p2) * (p1 - l1) + (p1 - l1) ** 2
    return max(-1.0, p2 - p1 - math.sqrt(max(0.0, down))), min(1.0, p2 - p1 + math.sqrt(max(0.0, up)))


def _phi(a: int, b: int, c: int, d: int) -> float:
    root = math.sqrt((a + b) * (c + d) * (a + c) * (b + d))
    product = float(a * d - b * c)
    if product > 0:
        product = max(0.0, product - (a + b + c + d) / 2)
    return product / root if root else 0.0


def sign_test(differences: Sequence[int]) -> float:
    """Two-sided p-value of the exact sign-flip test that the differences have no direction; 1 where all are 0.

    With differences in {-1, 0, 1} it is McNemar's exact test. Sums over several seeds of one prompt keep what belongs
    together in one difference.
    """
    sizes = [abs(value) for value in differences if value]
    observed = abs(sum(differences))
    weights = np.ones(1)  # weights[s]: share of sign patterns with sum s - total, kept in every second place
    for size in sizes:
        grown = np.zeros(len(weights) + 2 * size)
        grown[: len(weights)] += weights / 2
        grown[2 * size :] += weights / 2
        weights = grown
    sums = np.arange(len(weights)) - sum(sizes)
    return min(1.0, float(weights[np.abs(sums) >= observed].sum()))


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Two-sided p-value of McNemar's exact test (McNemar 1947) that two models have the same rate on paired
    outcomes."""
    return sign_test([int(now) - int(was) for was, now in zip(before, after, strict=True)])


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number, in the order given."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted
