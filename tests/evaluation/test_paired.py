"""Paired rates: the interval of a rise, exact tests against independent oracles, Holm's correction."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from safecl.evaluation.statistics.paired import Rise, holm, mcnemar, newcombe, rise, sign_test


def pairs(a, b, c, d):
    return [(True, True)] * a + [(False, True)] * b + [(True, False)] * c + [(False, False)] * d


def test_the_interval_of_a_rise_covers_the_true_difference_in_95_percent_of_samples():
    draw = np.random.default_rng(0)
    for joint in ([0.1, 0.1, 0.1, 0.7], [0.02, 0.08, 0.02, 0.88], [0.4, 0.1, 0.3, 0.2]):
        counts, truth = draw.multinomial(80, joint, size=1500), joint[1] - joint[2]
        inside = 0
        for row in counts:
            low, high = newcombe(pairs(*row.tolist()))
            inside += low <= truth <= high
        assert 0.93 < inside / len(counts) < 0.985, joint


def test_an_interval_of_paired_rates_is_narrower_than_that_of_independent_ones_where_they_agree():
    low, high = newcombe(pairs(40, 2, 2, 56))
    independent = newcombe(pairs(18, 24, 24, 34))  # the same rates, without agreement
    assert high - low < 0.6 * (independent[1] - independent[0])
    assert newcombe(pairs(0, 0, 0, 73))[1] == pytest.approx(3.8415 / (73 + 3.8415), abs=1e-4)


def test_a_rise_holds_whatever_undecided_outcomes_are():
    measured = rise([False, None, True, False] * 20, [True, False, None, False] * 20)
    assert measured.value == 0.5 and measured.n == 80 and measured.undecided == 40 and measured.gained == 20
    worst = rise([False, False, True, False] * 20, [True, False, True, False] * 20)
    best = rise([False, True, True, False] * 20, [True, False, False, False] * 20)
    assert measured.low <= min(worst.low, best.low) and measured.high >= max(worst.high, best.high)
    assert math.isnan(rise([None], [True]).value) and rise([None], [True]).to_dict()["value"] is None
    assert isinstance(measured, Rise)


def test_no_outcomes_and_other_prompts_are_refused():
    with pytest.raises(ValueError, match="same prompts"):
        rise([], [])
    with pytest.raises(ValueError, match="3 and 2"):
        rise([True] * 3, [True] * 2)


def test_the_sign_test_counts_the_patterns_of_signs():
    for values in ([1, 1, 1, -1, 0], [3, 1, -2, 2], [2, 2, 2, 2], [0, 0]):
        signs = itertools.product((-1, 1), repeat=len(values))
        patterns = [sum(s * abs(v) for s, v in zip(pattern, values, strict=True)) for pattern in signs]
        expected = sum(abs(total) >= abs(sum(values)) for total in patterns) / len(patterns)
        assert sign_test(values) == pytest.approx(expected)


def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs():
    for gained, lost in ((8, 1), (5, 5), (0, 4), (20, 8)):
        before, after = zip(*pairs(7, gained, lost, 9), strict=True)
        n, most = gained + lost, max(gained, lost)
        tail = sum(math.comb(n, k) for k in range(most, n + 1)) / 2**n
        assert mcnemar(before, after) == pytest.approx(min(1.0, 2 * tail))


def test_holm_adjusts_in_order_and_stays_within_one():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []
