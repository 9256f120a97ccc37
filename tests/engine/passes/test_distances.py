"""The distances of a micro-batch: which of them are computed together, in which order, and what they weigh."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from safecl.data import collate
from safecl.engine.passes.distances import OutputGroup, hidden_distances, output_distances, target_positions
from safecl.engine.passes.step_rows import HIDDEN, Distillation, StepRow
from safecl.replay import TeacherOutputs
from tests.engine import scenes

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "mse")
TEMPERATURES = (0.5, 1.0, 1.05, 1.5, 2.0, 10.0, 1e-05, 1e16, 1e22, float("inf"))
STORED = (None, 1, 2, 8, 10, 64, 80, 128, 100000)
TERMS = (None, "lwf", "lwf2", "l", "a!", "a", "a'b", "Z", "é", 'a"', "a'\"", "", "None")


def test_groups_are_in_the_order_of_their_tuples_as_text():
    """This order decides the last bits of a step's loss; runs from before the groups had names had it."""
    groups = [OutputGroup(*values) for values in itertools.product(DIVERGENCES, TEMPERATURES, STORED, TERMS)]
    random.Random(0).shuffle(groups)
    by_text = sorted(
        groups, key=lambda group: repr((group.divergence, group.temperature, group.num_stored, group.term))
    )
    assert sorted(groups, key=OutputGroup.order) == by_text


def outputs(num_tokens: int, k: int, value: float) -> TeacherOutputs:
    return TeacherOutputs(
        log_probs=np.full((num_tokens, k), value, np.float16),
        indices=np.zeros((num_tokens, k), np.int32),
        log_tail=np.full(num_tokens, value, np.float32),
    )


@pytest.fixture
def batch():
    """(rows, micro-batch, target positions of each row)."""
    rows = scenes.random_dataset(3, seed=4).rows(range(3))
    made = collate(rows, packed=True, pad_id=0)
    return rows, made, [target_positions(made, index, row) for index, row in enumerate(rows)]


def step_row(row, term: str, *distances: Distillation) -> StepRow:
    return StepRow(term, len(row), row.num_targets, lambda: (row, None), distillations=distances)


def test_rows_with_the_same_distance_are_stacked_and_weigh_their_own_weight(batch):
    rows, _, places = batch
    counts = [len(place) for place in places]
    step_rows = [
        step_row(rows[0], "task", Distillation("mse", 0.25), Distillation("forward_kl", 0.5, term="lwf")),
        step_row(rows[1], "task", Distillation("forward_kl", 0.125, term="lwf")),
        step_row(rows[2], "replay", Distillation("mse", 2.0)),
    ]
    stored = [outputs(count, 4, -1.0 - index) for index, count in enumerate(counts)]
    found, terms = output_distances(step_rows, stored, counts, ["task", "replay", "lwf"], world_size=2)
    assert [distance["divergence"] for distance in found] == ["forward_kl", "mse"]
    first, second, third = torch.arange(sum(counts)).split(counts)
    assert torch.equal(found[0]["rows"], torch.cat([first, second]))
    assert torch.equal(found[1]["rows"], torch.cat([first, third]))
    weights = [found[0]["kd_weights"][part].unique().tolist() for part in (first, second, third)]
    assert weights == [[1.0], [0.25], [0.0]]  # times the world size
    assert [found[1]["kd_weights"][part].unique().tolist() for part in (first, second, third)] == [[0.5], [0.0], [4.0]]
    assert found[1]["log_tail"].tolist() == [-1.0] * counts[0] + [-3.0] * counts[2]
    assert terms[0][torch.cat([first, second])].unique().tolist() == [2]
    assert terms[1][first].unique().tolist() == [0] and terms[1][third].unique().tolist() == [1]


def test_a_teacher_that_stored_another_number_of_entries_is_a_group_of_its_own(batch):
    rows, _, places = batch
    counts = [len(place) for place in places]
    step_rows = [step_row(row, "task", Distillation("jsd", 1.0)) for row in rows]
    stored = [outputs(count, k, -1.0) for count, k in zip(counts, (8, 16, 8), strict=True)]
    found, _ = output_distances(step_rows, stored, counts, ["task"], world_size=1)
    assert [distance["log_probs"].shape for distance in found] == [(counts[1], 16), (counts[0] + counts[2], 8)]


def test_without_stored_outputs_the_teacher_is_the_model_with_its_adapters_off(batch):
    rows, _, places = batch
    counts = [len(place) for place in places]
    step_rows = [step_row(row, "task", Distillation("jsd", 1.0, live=True)) for row in rows]
    (found,), _ = output_distances(step_rows, [None] * 3, counts, ["task"], world_size=1)
    assert set(found) == {"rows", "kd_weights", "divergence", "temperature"}


def test_given_hidden_states_come_before_those_with_the_adapters_off(batch):
    rows, made, places = batch
    states = torch.randn(len(rows[1]), 32)
    step_rows = [
        step_row(rows[0], "task", Distillation(HIDDEN, 0.5, term="lwf", live=True)),
        step_row(rows[1], "task", Distillation(HIDDEN, 0.25, term="lwf", load=lambda: states, tokens="all")),
        step_row(rows[2], "task"),
    ]
    found, terms = hidden_distances(step_rows, made, places, ["task", "lwf"], world_size=1)
    given, live = found
    assert torch.equal(given["hidden"], states) and "hidden" not in live
    assert given["positions"].tolist() == list(range(made.starts[1], made.starts[1] + len(rows[1])))
    assert live["positions"].tolist() == places[0].tolist()
    assert given["weights"].unique().tolist() == [0.25] and live["weights"].unique().tolist() == [0.5]
    assert [ids.unique().tolist() for ids in terms] == [[1], [1]]
