"""Rates over several runs on the same prompts: the pooled interval, and paired tests between cells."""

from __future__ import annotations

import numpy as np
import pytest

from safecl.evaluation.statistics.intervals import wilson
from safecl.evaluation.statistics.paired import mcnemar
from safecl.evaluation.statistics.pooled import paired_p_value, pooled_interval, score_interval, spread


def runs_of(matrix) -> list[dict]:
    """Outcomes by run from a matrix [prompts, runs]."""
    return [dict(enumerate(column.astype(bool).tolist())) for column in np.asarray(matrix).T]


def test_one_run_has_wilsons_interval():
    for hits in (0, 1, 7, 40):
        run = [dict(enumerate([True] * hits + [False] * (40 - hits)))]
        assert pooled_interval(run) == pytest.approx(wilson(hits, 40), abs=1e-3 if 0 < hits < 40 else 1e-12)
    assert score_interval(0.25, 40) == pytest.approx(wilson(10, 40))


def test_runs_that_repeat_each_other_add_nothing_and_independent_ones_add_all():
    draw = np.random.default_rng(0)
    once = draw.random((60, 1)) < 0.3
    same, other = pooled_interval(runs_of(np.repeat(once, 4, axis=1))), pooled_interval(runs_of(once))
    assert same == pytest.approx(other, abs=0.01)
    independent = pooled_interval(runs_of(draw.random((60, 4)) < 0.3))
    assert independent[1] - independent[0] < 0.6 * (same[1] - same[0])
    assert pooled_interval(runs_of(np.zeros((60, 4))))[1] == pytest.approx(wilson(0, 60)[1])


def test_the_pooled_interval_covers_the_rate_of_the_prompts_population():
    draw, inside = np.random.default_rng(1), 0
    for _ in range(600):
        of_prompt = draw.beta(0.6, 1.4, size=(80, 1))  # prompts differ: mean 0.3
        low, high = pooled_interval(runs_of(draw.random((80, 3)) < of_prompt))
        inside += low <= 0.3 <= high
    assert 0.92 < inside / 600 < 0.98


def test_undecided_outcomes_widen_the_interval_to_both_sides():
    run = [{i: None if i < 5 else i < 10 for i in range(40)}]
    low, high = pooled_interval(run)
    assert low == pytest.approx(wilson(5, 40)[0], abs=1e-3) and high == pytest.approx(wilson(10, 40)[1], abs=2e-3)


def test_a_spread_is_over_runs():
    assert spread([0.1, 0.3]).std == pytest.approx(0.1414, abs=1e-4) and spread([0.2]).std == 0.0
    assert spread([float("nan")]) is None and spread([1.0], (0.5, 1.0)).to_dict()["low"] == 0.5


def test_one_seed_is_mcnemars_test_and_seeds_of_a_prompt_stay_together():
    before, after = [False] * 30 + [True] * 10, [True] * 12 + [False] * 20 + [True] * 8
    one = paired_p_value({"0": dict(enumerate(after))}, {"0": dict(enumerate(before))})
    assert one == pytest.approx(mcnemar(before, after))
    repeated = {str(seed): dict(enumerate(after)) for seed in range(3)}
    assert paired_p_value(repeated, {seed: dict(enumerate(before)) for seed in repeated}) == pytest.approx(one)
    assert paired_p_value({"0": {1: True}}, {"1": {1: True}}) is None
