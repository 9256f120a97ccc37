"""Two gloo processes, each forward pass a collective as under ZeRO-3. A rank that stops early would hang the other, and
so the test."""

from __future__ import annotations

import pytest

from tests.evaluation import ranks
from tests.evaluation.models import random_prompts, tiny_model


@pytest.mark.parametrize(("num_prompts", "batch_size"), [([5, 1], 2), ([1, 6], 2), ([3, 0], 1), ([0, 0], 4)])
def test_generation_with_unequal_prompt_counts_calls_the_model_equally_often(rank_pool, num_prompts, batch_size):
    results = rank_pool(2).run(ranks.generate_unequal, num_prompts=num_prompts, batch_size=batch_size)
    assert results[0]["calls"] == results[1]["calls"]
    for rank, result in enumerate(results):
        from safecl.evaluation import HFEvalModel, generate_greedy

        alone = generate_greedy(
            HFEvalModel(tiny_model(seed=7)),
            random_prompts(num_prompts[rank], seed=rank),
            max_new_tokens=9,
            eos_ids=list(range(3, 20)),
            pad_id=0,
            batch_size=4,
        )
        assert result["answers"] == alone


@pytest.mark.parametrize("num_rows", [[7, 2], [0, 3]])
def test_scoring_with_unequal_row_counts_calls_the_model_equally_often(rank_pool, num_rows):
    results = rank_pool(2).run(ranks.score_unequal, num_rows=num_rows)
    assert results[0]["calls"] == results[1]["calls"] > 0
    assert [len(result["num_tokens"]) for result in results] == num_rows


@pytest.mark.parametrize("num_prompts", [1, 7])
def test_results_are_the_same_for_one_and_two_ranks_and_on_every_rank(rank_pool, num_prompts):
    alone = ranks.measure_everything(num_prompts)
    results = rank_pool(2).run(ranks.measure_everything, num_prompts=num_prompts)
    assert results[0]["calls"] == results[1]["calls"] < alone["calls"] * 1.01 + 8
    for result in results:
        assert result["outputs"]["safety"] == alone["outputs"]["safety"]
        assert [record["id"] for record in alone["outputs"]["safety"][:num_prompts]] == [
            f"disallowed-{i}" for i in range(num_prompts)
        ]
        assert result["results"]["safety"] == alone["results"]["safety"]
        for metric in ("label_accuracy", "exact_match", "gsm8k"):
            assert result["results"]["tasks"][metric] == alone["results"]["tasks"][metric]
            assert [record["answer"] for record in result["outputs"][metric]] == [
                record["answer"] for record in alone["outputs"][metric]
            ]
        for end in ("value", "low", "high", "tokens"):
            expected = alone["results"]["tasks"]["answer_nll"][end]
            assert result["results"]["tasks"]["answer_nll"][end] == pytest.approx(expected, rel=1e-6)


def test_a_prompt_refused_on_one_rank_stops_both(rank_pool):
    first, second = rank_pool(2).run(ranks.refuse_on_one_rank)
    assert "another rank's prompts" in first
    assert "prompt 0 has no tokens" in second
