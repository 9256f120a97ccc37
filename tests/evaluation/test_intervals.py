from __future__ import annotations

import json
import math

import numpy as np
import pytest

from safecl.config import ConfigError
from safecl.evaluation import smallest_passing_size, wilson
from safecl.evaluation.statistics.intervals import Z95, difference, rate, token_mean


def wilson_by_inversion(hits, n):
    """The interval by its definition: all p for which |h/n - p| <= z sqrt(p (1 - p) / n), found by bisection."""

    def edge(inside, outside):
        for _ in range(200):
            middle = (inside + outside) / 2
            fits = abs(hits / n - middle) <= Z95 * math.sqrt(middle * (1 - middle) / n)
            inside, outside = (middle, outside) if fits else (inside, middle)
        return inside

    return edge(hits / n, 0.0), edge(hits / n, 1.0)


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (1, 7), (3, 10), (50, 100), (199, 200), (7, 7), (1, 100_000)])
def test_wilson_equals_the_inversion_of_the_score_test(hits, n):
    assert wilson(hits, n) == pytest.approx(wilson_by_inversion(hits, n), rel=1e-9, abs=1e-12)


def test_wilson_holds_its_95_percent():
    """Exact coverage, summed over the binomial: near 0.95 on average over p, as Brown, Cai and DasGupta show."""
    n, covered = 50, []
    for p in np.linspace(0.02, 0.98, 97):
        chances = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
        covered.append(sum(chance for k, chance in enumerate(chances) if wilson(k, n)[0] <= p <= wilson(k, n)[1]))
    assert 0.945 < np.mean(covered) < 0.96 and min(covered) > 0.88


def test_no_trials_say_nothing_and_wrong_counts_are_refused():
    assert wilson(0, 0) == (0.0, 1.0)
    for hits, n in [(3, 2), (-1, 4), (0, -1)]:
        with pytest.raises(ValueError, match="is not a count"):
            wilson(hits, n)
    with pytest.raises(ValueError, match="at least one outcome"):
        rate([])


def test_a_rate_keeps_what_it_counted():
    result = rate([True, False, "empty", None])
    assert (result.hits, result.n, result.value) == (2, 4, 0.5)
    assert (result.low, result.high) == wilson(2, 4)


@pytest.mark.parametrize("limit", [0.5, 0.15, 0.1, 0.05, 0.02, 0.01, 0.003, 0.99, 1.0])
def test_the_smallest_passing_size_passes_and_one_less_does_not(limit):
    size = smallest_passing_size(limit)
    assert wilson(0, size)[1] <= limit
    assert size == 1 or wilson(0, size - 1)[1] > limit


def test_known_sizes():
    assert [smallest_passing_size(limit) for limit in (0.05, 0.02, 0.01)] == [73, 189, 381]


def test_a_limit_of_zero_is_refused_because_nothing_can_show_it():
    with pytest.raises(ConfigError, match="a limit of 0 can never be shown"):
        smallest_passing_size(0.0)


def test_a_token_mean_is_the_ratio_of_sums_and_its_interval_covers_by_rows():
    """2,000 draws of 40 rows whose tokens share a row effect: an interval over independent tokens would cover far less
    than 95 %."""
    generator, covered = np.random.default_rng(0), 0
    for _ in range(2000):
        counts = generator.integers(1, 30, size=40)
        level = generator.normal(1.0, 0.5, size=40)
        sums = [float(generator.normal(mean, 0.1, size=count).sum()) for mean, count in zip(level, counts, strict=True)]
        mean = token_mean(sums, counts.tolist())
        covered += mean.low <= 1.0 <= mean.high
    assert mean.value == pytest.approx(sum(sums) / counts.sum())
    assert 0.92 < covered / 2000 < 0.97


def test_the_spread_between_few_rows_is_not_taken_for_that_of_all():
    """Two rows of one token each: m = 3, R / (R - 1) * sum of squares = 4, half = z * 2 / 2."""
    mean = token_mean([2.0, 4.0], [1, 1])
    assert (mean.low, mean.value, mean.high) == pytest.approx((3 - Z95, 3.0, 3 + Z95))


def test_one_row_gives_no_interval_and_its_json_is_valid():
    mean = token_mean([3.0], [2])
    assert (mean.value, mean.low, mean.high) == (1.5, -math.inf, math.inf)
    assert json.loads(json.dumps(mean.to_dict(), allow_nan=False)) == {
        "value": 1.5,
        "low": None,
        "high": None,
        "tokens": 2,
        "n": 1,
    }
    with pytest.raises(ValueError, match="at least one token"):
        token_mean([0.0], [0])


def test_the_interval_of_a_difference_is_that_of_newcombe_1998():
    """Example (a) of the paper, 56/70 against 48/80, by its method 10."""
    value, low, high = difference(rate([1] * 56 + [0] * 14), rate([1] * 48 + [0] * 32))
    assert (round(value, 4), round(low, 4), round(high, 4)) == (0.2, 0.0524, 0.3339)
