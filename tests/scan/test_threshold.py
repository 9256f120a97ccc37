"""The threshold keeps its promise where there are known harmless rows, and finds the poison where there are none."""

from __future__ import annotations

import numpy as np
import pytest

from safecl.config import ConfigError
from safecl.scan import threshold_from_benign, threshold_from_upload
from safecl.scan.threshold import beta_binomial_quantile, poisoned_share

RNG = np.random.default_rng


def harmless(n: int, seed: int, kind: str = "skewed") -> np.ndarray:
    rng = RNG(seed)
    return {
        "skewed": -4 - rng.gamma(2.0, 3.0, n),
        "two tasks": np.where(rng.random(n) < 0.5, -12, -30) + rng.normal(0, 2, n),
    }[kind]


def refused(n: int, seed: int) -> np.ndarray:
    return -RNG(seed).gamma(1.5, 0.7, n)


def test_known_harmless_rows_keep_the_false_alarm_rate_whatever_the_distribution():
    for kind in ("skewed", "two tasks"):
        rates = []
        for seed in range(400):
            t = threshold_from_benign(harmless(150, seed, kind), 1000, 0.02)
            rates.append((harmless(200, 10_000 + seed, kind) > t.value).mean())
        assert np.mean(rates) == pytest.approx(t.false_alarm, rel=0.15)
        assert t.false_alarm <= 0.02


def test_too_few_known_harmless_rows_are_named_with_what_works():
    with pytest.raises(
        ConfigError, match=r"98 rows cannot give .* 0.01; at least 99 are needed, or scan.false_alarm: 0.0102"
    ):
        threshold_from_benign(harmless(98, 0), 10, 0.01)
    assert threshold_from_benign(harmless(99, 0), 10, 0.01).false_alarm == pytest.approx(0.01)
    assert threshold_from_benign(harmless(98, 0), 10, 0.0102).false_alarm <= 0.0102


def test_how_many_harmless_rows_are_flagged_by_chance_is_beta_binomial():
    rng = RNG(1)
    counts = rng.binomial(500, rng.beta(2, 149, 400_000))
    assert beta_binomial_quantile(500, 2, 149, 0.999) == pytest.approx(np.quantile(counts, 0.999), abs=1)
    flagged_too_often = 0
    for seed in range(2000):
        t = threshold_from_benign(harmless(150, seed), 300, 0.02)
        flagged_too_often += int((harmless(300, 50_000 + seed) > t.value).sum() > t.most_expected)
    assert flagged_too_often <= 8  # 2 expected
    assert 6 < t.most_expected < 30  # 6 of the 300 are flagged on average


def test_the_share_of_known_disallowed_prompts_above_the_threshold_is_told():
    known = np.array([-0.5, -1.0, -2.0, -40.0])
    assert threshold_from_benign(harmless(150, 0), 100, 0.02, known).caught == 0.75
    assert threshold_from_benign(harmless(150, 0), 100, 0.02).caught is None


@pytest.mark.parametrize("kind", ["skewed", "two tasks"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.3, 0.6])
def test_without_known_harmless_rows_the_poison_is_caught_at_any_share(kind, share):
    caught, alarms, told, estimated = [], [], [], []
    for seed in range(20):
        clean, poison = harmless(600, seed, kind), refused(int(600 * share / (1 - share)), 500 + seed)
        t = threshold_from_upload(np.concatenate([clean, poison]), refused(200, 900 + seed), 0.01)
        alarms.append((clean > t.value).mean())
        told.append(t.false_alarm)
        estimated.append(t.poisoned)
        caught.append((poison > t.value).mean() if len(poison) else 1.0)
    assert np.mean(caught) >= 0.88
    assert np.mean(alarms) <= 0.02
    assert np.mean(told) <= 0.05, "poison is not counted among the false alarms"
    assert np.mean(estimated) == pytest.approx(share, abs=0.05)


def test_a_rule_by_median_and_spread_would_miss_what_this_one_catches():
    """This is the reason against a robust quantile of the upload alone."""
    clean, poison = harmless(600, 1), refused(150, 2)
    upload = np.concatenate([clean, poison])
    spread = 1.4826 * np.median(np.abs(upload - np.median(upload)))
    assert (poison > np.median(upload) + 2.326 * spread).mean() < 0.1
    assert (poison > threshold_from_upload(upload, refused(200, 3), 0.01).value).mean() > 0.85


def test_rows_that_all_score_alike_are_not_flagged():
    upload = np.full(50, -20.0)
    assert not (upload > threshold_from_upload(upload, refused(100, 4), 0.01).value).any()
    assert poisoned_share(upload, refused(100, 4)) == 0.0


@pytest.mark.parametrize("num_poisoned", [1, 2, 40])
def test_an_upload_of_disallowed_prompts_alone_is_flagged_and_its_false_alarms_are_a_share(num_poisoned):
    known = refused(200, 5)
    upload = np.full(num_poisoned, np.quantile(known, 0.6))
    t = threshold_from_upload(upload, known, 0.01)
    assert (upload > t.value).all() and t.poisoned == 1.0 and t.false_alarm == 0.0
    with_one = threshold_from_upload(np.append(upload, -20.0), known, 0.01)
    assert -20.0 <= with_one.value < upload[0] and 0.0 <= with_one.false_alarm <= 1.0
