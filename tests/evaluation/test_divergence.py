"""KL from the aligned model: against an fp64 oracle over the whole vocabulary, and on two ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from safecl.evaluation import HFEvalModel
from safecl.evaluation.answers.divergence import ScoredRow, divergence, top_outputs
from tests.evaluation.models import random_prompts, tiny_model


def rows(count: int = 5) -> list[ScoredRow]:
    found = []
    for ids in random_prompts(count, seed=3, shortest=4):
        mask = np.zeros(len(ids), bool)
        mask[len(ids) // 2 :] = True
        found.append(ScoredRow(np.array(ids, np.int32), mask))
    return found


def oracle(first, second) -> float:
    total, count = 0.0, 0
    for ids, mask in rows():
        logits = [model(torch.as_tensor(ids, dtype=torch.long)[None]).logits[0].double() for model in (first, second)]
        p, q = (torch.log_softmax(each, -1)[:-1][torch.as_tensor(mask[1:])] for each in logits)
        total, count = total + float((p.exp() * (p - q)).sum()), count + len(p)
    return total / count


@pytest.mark.filterwarnings("error")
@torch.no_grad()
def test_the_kl_is_that_of_the_whole_vocabulary_and_fewer_entries_bound_it_from_below():
    first, second = tiny_model(seed=1), tiny_model(seed=2)
    kept = {k: top_outputs(HFEvalModel(first), rows(), k) for k in (8, 97)}
    mapped = [ScoredRow(*(_read_only(part) for part in row)) for row in rows()]
    found = {k: divergence(HFEvalModel(second), mapped, outputs).value for k, outputs in kept.items()}
    assert found[97] == pytest.approx(oracle(first, second), rel=1e-5)
    assert 0.2 * found[97] < found[8] < found[97]
    assert divergence(HFEvalModel(first), rows(), kept[8]).value == pytest.approx(0.0, abs=1e-6)


def _read_only(part) -> np.ndarray:
    """As a data set's mapped files are."""
    array = np.array(part)
    array.flags.writeable = False
    return array


def on_ranks() -> float:
    first, second = HFEvalModel(tiny_model(seed=1)), HFEvalModel(tiny_model(seed=2))
    return divergence(second, rows(), top_outputs(first, rows(), 97)).value


def test_two_ranks_with_unequal_numbers_of_rows_find_the_same(rank_pool):
    first, second = rank_pool(2).run(on_ranks)
    assert first == second == pytest.approx(on_ranks(), rel=1e-6)
