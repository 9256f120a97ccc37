"""The confidence sequence holds at all times at once, also for means that move, and starts anew after a window."""

from __future__ import annotations

import math

import numpy as np
import pytest

from safecl.evaluation.statistics.association import auc, pearson, spearman
from safecl.evaluation.statistics.sequential import ConfidenceSequence


def test_it_holds_the_weighted_mean_at_every_look_in_95_percent_of_runs():
    """The means react to what was seen, as a controller's do."""
    draw, left = np.random.default_rng(0), 0
    for _ in range(150):
        sequence, weighted, bets, mean = ConfidenceSequence(-1.0, 1.0, 0.05, 10**6), 0.0, 0.0, 0.1
        for _ in range(150):
            before = sequence.sum_bets
            sequence.update([float(draw.random() < max(0.0, mean)) - float(draw.random() < max(0.0, -mean))])
            bet = sequence.sum_bets - before
            weighted, bets = weighted + bet * mean, bets + bet
            mean = 0.3 if sequence.mean < 0.05 else mean * 0.9
            if not sequence.low <= weighted / bets <= sequence.high:
                left += 1
                break
    assert left / 150 <= 0.05


def test_calm_is_shown_in_as_many_observations_as_the_formula_says():
    sequence = ConfidenceSequence(0.0, 1.0, 0.05, 10**6)
    sequence.update([0.0] * 320)
    # every look but the first few bets 3/4, and has no variance to pay for in the end
    assert sequence.high == pytest.approx(math.log(80) / (0.75 * 320), rel=0.1) and sequence.low == 0.0
    assert ConfidenceSequence(-1.0, 1.0, 0.05, 10).high == 1.0


def test_a_rise_after_a_calm_window_is_seen_in_the_next_one():
    forgets, remembers = (ConfidenceSequence(0.0, 1.0, 0.05, window) for window in (200, 10**6))
    for sequence in (forgets, remembers):
        sequence.update([0.0] * 200 + [1.0, 0.0] * 60)
    assert forgets.low > 0.2 > remembers.mean * 0.9 and forgets.number == 2
    assert ConfidenceSequence(**forgets.to_dict()) == forgets


def test_correlations_and_the_area_under_the_curve():
    x, y = [1.0, 2.0, 3.0, 5.0], [2.0, 1.0, 4.0, 6.0]
    assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1]) and spearman(x, y) == pytest.approx(0.8)
    assert pearson([1.0, 2.0], [1.0, 2.0]) is None and pearson([1.0] * 3, x[:3]) is None
    assert spearman([1.0, 1.0, 2.0], [3.0, 3.0, 9.0]) == pytest.approx(1.0)
    scores, hits = [0.1, 0.4, 0.4, 0.8], [False, False, True, True]
    pairs = [(a > b) + (a == b) / 2 for a in (0.4, 0.8) for b in (0.1, 0.4)]
    assert auc(scores, hits) == pytest.approx(sum(pairs) / 4) and auc(scores, [True] * 4) is None
