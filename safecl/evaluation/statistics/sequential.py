"""A confidence sequence: an interval for a mean that may be looked at after every observation.

Predictable plug-in empirical Bernstein (Waudby-Smith and Ramdas 2024, JRSS B 86, theorem 2), for observations X_i
within [0, 1] after scaling, each with a mean mu_i given the past:

    centre_t = Σ λ_i X_i / Σ λ_i
    half_t   = (log(2 / α) + Σ v_i ψ(λ_i)) / Σ λ_i,   v_i = (X_i - m_{i-1})²,   ψ(λ) = -log(1 - λ) - λ
    λ_i      = min(√(2 log(2 / α) / (s²_{i-1} i log(1 + i))), c)

with m_i = (1/2 + Σ X) / (i + 1) and s²_i = (1/4 + Σ (X - m)²) / (i + 1). With probability 1 - α the interval holds the
λ-weighted mean of the mu_i at all t at once, whatever the mu_i do and whatever is done in response. (The paper writes
4 v_i and ψ / 4, which is the same.)

The sequence starts anew after `window` observations, so that an old calm does not hide a new rise; the w-th one is
given α / (w (w + 1)), which adds up to α.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

LARGEST_BET = 0.75


@dataclass
class ConfidenceSequence:
    """The state of a sequence; all plain numbers, so that it can be saved."""

    lowest: float
    """Smallest possible observation."""
    highest: float
    alpha: float
    window: int
    number: int = 1
    """Number of the current window, from 1."""
    count: int = 0
    """Observations in the current window."""
    sum_x: float = 0.0
    sum_squares: float = 0.0
    """Σ (X - m)² of the scaled observations."""
    sum_bets: float = 0.0
    sum_weighted: float = 0.0
    sum_variance: float = 0.0

    def update(self, values: Iterable[float]) -> None:
        """Take further observations."""
        for value in values:
            if self.count == self.window:
                self._begin_anew()
            self._add((value - self.lowest) / (self.highest - self.lowest))

    def _add(self, x: float) -> None:
        i = self.count + 1
        mean, variance = (0.5 + self.sum_x) / i, (0.25 + self.sum_squares) / i
        bet = min(math.sqrt(2 * self._log / (variance * i * math.log(1 + i))), LARGEST_BET)
        self.sum_bets += bet
        self.sum_weighted += bet * x
        self.sum_variance += (x - mean) ** 2 * (-math.log(1 - bet) - bet)
        self.count, self.sum_x = i, self.sum_x + x
        self.sum_squares += (x - (0.5 + self.sum_x) / (i + 1)) ** 2

    def _begin_anew(self) -> None:
        self.number, self.count = self.number + 1, 0
        self.sum_x = self.sum_squares = self.sum_bets = self.sum_weighted = self.sum_variance = 0.0

    @property
    def _log(self) -> float:
        return math.log(2 * self.number * (self.number + 1) / self.alpha)

    @property
    def mean(self) -> float:
        """The centre of the interval; the middle of the range before the first observation."""
        centre = self.sum_weighted / self.sum_bets if self.count else 0.5
        return self.lowest + centre * (self.highest - self.lowest)

    @property
    def low(self) -> float:
        return max(self.lowest, self.mean - self._half)

    @property
    def high(self) -> float:
        return min(self.highest, self.mean + self._half)

    @property
    def _half(self) -> float:
        if not self.count:
            return self.highest - self.lowest
        return (self._log + self.sum_variance) / self.sum_bets * (self.highest - self.lowest)

    def to_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return asdict(self)
