"""An estimate of a model is made without dropout, with the layers still checkpointed; training keeps its dropout."""

from __future__ import annotations

import pytest
import torch

from tests.engine.model import dropout_families


@pytest.fixture(scope="module")
def found(rank_pool) -> dict[str, dict]:
    return rank_pool(1).run(dropout_families.estimates, families=list(dropout_families.PLACES))[0]


@pytest.mark.parametrize("family", dropout_families.PLACES)
def test_a_fisher_estimate_does_not_depend_on_dropout(found, family):
    first, again, without = found[family]["estimates"]
    assert first.abs().sum() > 0
    assert torch.equal(first, again), "two estimates differ"
    assert torch.equal(first, without), "dropout changes the estimate"


@pytest.mark.parametrize("family", dropout_families.PLACES)
def test_a_training_step_has_the_dropout_of_the_model(found, family):
    one, other = found[family]["losses"]
    assert one != other


@pytest.mark.parametrize("family", dropout_families.PLACES)
def test_an_estimate_checkpoints_the_layers(found, family):
    assert found[family]["repeated"]


def test_an_estimate_on_two_ranks_does_not_depend_on_dropout(rank_pool):
    for parts in rank_pool(2).run(dropout_families.estimates, families=["opt"], stage=3):
        first, again, without = parts["opt"]["estimates"]
        assert torch.equal(first, again) and torch.equal(first, without)
