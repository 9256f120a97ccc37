"""Intervals of measured rates and means, and the number of prompts that a limit needs.

Wilson score interval of h hits among n, at 95 % (Wilson 1927; Brown, Cai, DasGupta 2001), with p = h / n and z = 1.96:

    (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)

It stays within [0, 1] and has a width at 0 or n hits: its upper end for no hits is z² / (n + z²).

Of u undecided outcomes nobody knows which are hits, so the interval reaches from the lower end without any of them to
the upper end with all of them: low(h, n) to high(h + u, n). The rate itself is h / (n - u).

Difference of two independent rates, 95 % (Newcombe 1998, method 10), from their Wilson intervals l, u:

    a - b,  low = (a - b) - √((a - l_a)² + (u_b - b)²),  high = (a - b) + √((u_a - a)² + (b - l_b)²)

Mean over tokens whose values are sums per row (a row's tokens are not independent, so rows are the sampling unit):

    m = Σ s_r / Σ n_r,   standard error = √(R/(R-1) Σ (s_r - m n_r)²) / Σ n_r
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import BeforeValidator

from safecl.config import ConfigError

Z95 = 1.959963984540054
"""Two-sided 95 % point of the normal distribution."""


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a rate: `hits` among `n` trials; (0, 1) without trials. ValueError where hits is not
    within 0..n."""
    if n < 0 or not 0 <= hits <= n:
        raise ValueError(f"wilson: {hits} hits among {n} trials is not a count")
    if n == 0:
        return 0.0, 1.0
    rate, z2 = hits / n, Z95 * Z95
    centre = rate + z2 / (2 * n)
    half = Z95 * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    low, high = (centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)
    # Rounding would leave 1e-17 instead of 0 at the lower end.
    return (0.0 if hits == 0 else low), (1.0 if hits == n else high)


def _null_as(number: float) -> BeforeValidator:
    return BeforeValidator(lambda value: number if value is None else value)


@dataclass(frozen=True)
class Rate:
    """A share of `n` trials with its 95 % Wilson interval; all in [0, 1].

    undecided: trials without an outcome, part of `n`. The value is the share of the others, and NaN where there are
    none; `to_dict` writes it as null.
    """

    hits: int
    n: int
    value: Annotated[float, _null_as(math.nan)]
    low: float
    high: float
    undecided: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for results.json."""
        value = self.value if math.isfinite(self.value) else None
        undecided = {"undecided": self.undecided} if self.undecided else {}
        return {"value": value, "low": self.low, "high": self.high, "hits": self.hits, "n": self.n, **undecided}


@dataclass(frozen=True)
class Mean:
    """A mean over `tokens` tokens of `n` rows with its 95 % normal interval, infinite for one row, which has no spread.

    JSON has no infinities: `to_dict` writes them as null, and pydantic reads null back.
    """

    n: int
    tokens: int
    value: Annotated[float, _null_as(math.nan)]
    low: Annotated[float, _null_as(-math.inf)]
    high: Annotated[float, _null_as(math.inf)]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for results.json."""
        ends = (end if math.isfinite(end) else None for end in (self.value, self.low, self.high))
        return {**dict(zip(("value", "low", "high"), ends, strict=True)), "tokens": self.tokens, "n": self.n}


def rate(outcomes: Iterable[object], undecided: int = 0) -> Rate:
    """Compute the share of true outcomes with its interval. `undecided`: further trials, without an outcome. ValueError
    without trials."""
    decided = [bool(outcome) for outcome in outcomes]
    hits, n = sum(decided), len(decided) + undecided
    if not n:
        raise ValueError("a rate needs at least one outcome")
    value = hits / len(decided) if decided else math.nan
    return Rate(hits, n, value, wilson(hits, n)[0], wilson(hits + undecided, n)[1], undecided)


def rate_of_decided(outcomes: Iterable[bool | None]) -> Rate:
    """Compute the share of true outcomes with its interval, where None is an undecided one. ValueError without any."""
    outcomes = list(outcomes)
    return rate((outcome for outcome in outcomes if outcome is not None), undecided=outcomes.count(None))


def with_undecided(measured: Rate, more: int) -> Rate:
    """Take `more` of the trials that were no hits for undecided."""
    undecided = measured.undecided + more
    decided = measured.n - undecided
    value = measured.hits / decided if decided else math.nan
    return replace(measured, value=value, high=wilson(measured.hits + undecided, measured.n)[1], undecided=undecided)


def difference(a: Rate | Mean, b: Rate | Mean) -> tuple[float, float, float]:
    """Return a - b with its 95 % interval (value, low, high), for two independent samples; NaN where a value is."""
    value = a.value - b.value
    low = value - math.hypot(a.value - a.low, b.high - b.value)
    return value, low, value + math.hypot(a.high - a.value, b.value - b.low)


def token_mean(sums: Sequence[float], counts: Sequence[int]) -> Mean:
    """Compute the mean per token from each row's sum and number of tokens, with rows as the sampling unit.
    ValueError without tokens."""
    total = sum(counts)
    if total <= 0:
        raise ValueError("a mean over tokens needs at least one token")
    value, num_rows = math.fsum(sums) / total, len(sums)
    if num_rows < 2:
        return Mean(num_rows, total, value, -math.inf, math.inf)
    squares = math.fsum((s - value * c) ** 2 for s, c in zip(sums, counts, strict=True))
    half = Z95 * math.sqrt(num_rows / (num_rows - 1) * squares) / total
    return Mean(num_rows, total, value, value - half, value + half)


def smallest_passing_size(max_rate: float) -> int:
    """Return the fewest prompts with which a limit can be passed: with no hits among them, the interval's upper end is
    at most `max_rate`.

    0.05 needs 73, 0.02 needs 189, 0.01 needs 381. ConfigError for a limit of 0: no finite set of prompts can show it.
    """
    if max_rate <= 0:
        raise ConfigError(
            "a limit of 0 can never be shown by measuring: no hits among n prompts still leave up to 3.84 / (n + 3.84)"
            "; 0.02 needs 189 prompts, 0.01 needs 381"
        )
    if max_rate >= 1:
        return 1
    n = max(1, math.ceil(Z95 * Z95 * (1 - max_rate) / max_rate) - 1)
    while wilson(0, n)[1] > max_rate:
        n += 1
    return n
