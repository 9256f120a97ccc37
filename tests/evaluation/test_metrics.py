from __future__ import annotations

import numpy as np
import pytest

from safecl.evaluation.statistics.continual import (
    average_score,
    backward_transfer,
    forgetting,
    forward_transfer,
    intransigence,
    max_over_training,
    min_accuracy,
    windowed_forgetting,
    worst_case_accuracy,
)

R = [[0.9, 0.2, 0.1], [0.7, 0.8, 0.3], [0.6, 0.85, 0.7]]


def random_matrix(seed, size=5):
    return np.random.default_rng(seed).uniform(size=(size, size))


def test_worked_example_has_the_right_signs():
    assert average_score(R) == pytest.approx((0.6 + 0.85 + 0.7) / 3)
    assert backward_transfer(R) == pytest.approx(((0.6 - 0.9) + (0.85 - 0.8)) / 2)
    assert forward_transfer(R, [0.1, 0.15, 0.05]) == pytest.approx(((0.2 - 0.15) + (0.3 - 0.05)) / 2)
    assert forgetting(R) == pytest.approx(((0.9 - 0.6) + (0.8 - 0.85)) / 2)


@pytest.mark.parametrize("seed", range(3))
def test_matrix_metrics_equal_numpy_oracles(seed):
    scores = random_matrix(seed)
    last, matrix, start = len(scores) - 1, scores.tolist(), random_matrix(seed + 9)[0]
    assert average_score(matrix) == pytest.approx(scores[last].mean())
    assert backward_transfer(matrix) == pytest.approx((scores[last] - scores.diagonal())[:last].mean())
    assert forward_transfer(matrix, start.tolist()) == pytest.approx((scores.diagonal(1) - start[1:]).mean())
    assert forgetting(matrix) == pytest.approx((scores[:last].max(0) - scores[last])[:last].mean())


def test_scores_that_were_not_measured_never_count_as_zero():
    """Negative scores (minus an nll): a zero in place of a missing value would be the maximum."""
    matrix = [[-1.0, None, None], [-2.0, -1.5, float("nan")], [-3.0, -1.0, -0.5]]
    assert forgetting(matrix) == pytest.approx(((-1.0 + 3.0) + (-1.5 + 1.0)) / 2)
    assert backward_transfer(matrix) == pytest.approx(((-3.0 + 1.0) + (-1.0 + 1.5)) / 2)
    assert forward_transfer(matrix, [0.0, 0.0, 0.0]) is None


def test_a_single_task_has_no_transfer_and_no_forgetting():
    assert average_score([[0.5]]) == 0.5
    assert (
        backward_transfer([[0.5]]) is None and forgetting([[0.5]]) is None and forward_transfer([[0.5]], [0.1]) is None
    )


def test_the_worst_attack_success_rate_is_the_largest_of_the_course():
    assert max_over_training([0.02, None, 0.4, 0.1]) == 0.4
    assert max_over_training([None]) is None


def test_lowest_score_after_a_task_was_finished_finds_a_dip_that_recovered():
    course = [[0.1, 0.0], [0.9, 0.0], [0.3, 0.2], [0.8, 0.7]]
    assert min_accuracy(course, [1, 3]) == [0.3, None]
    assert worst_case_accuracy(course, [1, None], current=1) == pytest.approx((0.7 + 0.3) / 2)


def test_windowed_forgetting_equals_a_search_over_all_pairs():
    scores = np.random.default_rng(4).uniform(size=30).tolist()
    for window in (2, 5, 30):
        drops = [scores[i] - scores[j] for i in range(30) for j in range(i, min(30, i + window))]
        assert windowed_forgetting(scores, window) == pytest.approx(max(drops))
    assert windowed_forgetting([0.1, 0.2, 0.3], 3) == 0.0
    assert windowed_forgetting([0.9, 0.5, 0.1], 2) == pytest.approx(0.4)
    assert windowed_forgetting([0.9, 0.5, 0.1], 3) == pytest.approx(0.8)


def test_matrices_that_are_not_square_are_refused():
    with pytest.raises(ValueError, match="square"):
        forgetting([[0.1, 0.2]])
    with pytest.raises(ValueError, match="untrained has 1 scores for 2 tasks"):
        forward_transfer([[0.1, 0.2], [0.1, 0.2]], [0.1])


def test_intransigence_is_what_a_free_reference_learns_more():
    matrix = [[0.6, 0.1], [0.5, 0.7]]
    assert intransigence(matrix, [0.8, 0.8]) == pytest.approx((0.2 + 0.1) / 2)
    assert intransigence(matrix, [None, 0.6]) == pytest.approx(-0.1) and intransigence(matrix, [None, None]) is None
    with pytest.raises(ValueError, match="3 scores for 2 tasks"):
        intransigence(matrix, [0.1, 0.2, 0.3])
