"""The three means of the user's loss train the numbers of a few lines of fp64 PyTorch, in every ZeRO stage."""

from __future__ import annotations

import functools
import statistics

import numpy as np
import pytest
import torch

from safecl.planning.loss_mean import median_targets, token_weights
from tests.engine import scenes
from tests.engine.passes import oracle
from tests.engine.passes.test_equality import memory_of
from tests.methods import reference
from tests.methods.test_lwf import HIDDEN, distance
from tests.methods.test_replay_methods import drawn, task_rows
from tests.training import resume_scenes

STEPS = 5
METHODS = {"er": {"weight": 0.5}, "lwf": HIDDEN}


def losses_of(model, row) -> torch.Tensor:
    """fp64 loss of each supervised token of a row."""
    chosen = reference.ids_of(row)[0, 1:][torch.from_numpy(row.loss_mask[1:].copy())]
    return -reference.log_probs(model, row, 1.0).gather(-1, chosen[:, None])[:, 0]


def mean_loss(model, rows, mean: str, median: float) -> torch.Tensor:
    losses = [losses_of(model, row) for row in rows]
    if mean == "rows":
        return torch.stack([row.mean() for row in losses]).mean()
    weights = [min(1.0, median / len(row)) if mean == "capped" else 1.0 for row in losses]
    total = sum(weight * row.sum() for weight, row in zip(weights, losses, strict=True))
    return total / sum(weight * len(row) for weight, row in zip(weights, losses, strict=True))


@functools.cache
def expected(mean: str) -> dict[str, torch.Tensor]:
    """Weights after plain PyTorch in fp64. ER and LwF are means over tokens, whatever the mean of the user's loss."""
    model, teacher = scenes.tiny_model(dtype=torch.float64), scenes.tiny_model(dtype=torch.float64)
    data = scenes.random_dataset(60, seed=1)
    median = statistics.median(data.num_targets.tolist())
    replayed = drawn(memory_of(scenes.random_dataset(20, seed=2)), "replay", STEPS)
    losses = [
        lambda rows=rows, old=old: (
            mean_loss(model, rows, mean, median)
            + 0.5 * torch.cat([losses_of(model, row) for row in old]).mean()
            + distance(HIDDEN, model, teacher, rows)
        )
        for rows, old in zip(task_rows(data, STEPS), replayed, strict=True)
    ]
    return reference.train(model, losses)


def start() -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in scenes.tiny_model().named_parameters()}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("mean", ["rows", "capped"])
def test_a_mean_of_the_loss_equals_fp64_on_two_ranks_and_several_micro_batches(rank_pool, mean, stage):
    from tests.methods.scenes import train

    packing = "padded" if stage == 1 else "packed"
    settings = {"loss_mean": mean, "packing": packing, "tokens_per_microbatch": 64}
    found = rank_pool(2).run(train, steps=STEPS, methods=METHODS, train=settings, deepspeed={"stage": stage})[0]
    assert oracle.relative_distance(found["weights"], expected(mean), start()) <= 1e-3
    assert oracle.relative_distance(found["weights"], expected("tokens"), start()) > 1e-2


def test_the_number_of_ranks_and_the_size_of_micro_batches_do_not_change_a_mean(rank_pool):
    from tests.methods.scenes import train

    settings = {"loss_mean": "capped", "tokens_per_microbatch": 512}
    found = rank_pool(1).run(train, steps=STEPS, methods=METHODS, train=settings, deepspeed={"stage": 2})[0]
    assert oracle.relative_distance(found["weights"], expected("capped"), start()) <= 1e-3


@pytest.mark.parametrize("mean", ["rows", "capped"])
def test_a_stopped_run_resumes_with_the_same_mean_bit_for_bit(rank_pool, tmp_path, mean):
    changes = dict(methods={"der": {}}, train={"loss_mean": mean}, deepspeed={"stage": 2})
    folder = str(tmp_path / "run")
    for differences in rank_pool(2).run(resume_scenes.cut_at_every_step, folder=folder, steps=3, cuts=1, **changes):
        assert not differences, differences


def test_the_weights_of_each_mean_are_those_of_its_formula():
    targets = np.array([2, 2, 18, 0, 4])
    assert token_weights("tokens", targets, 2.0).tolist() == [1 / 26] * 5
    rows = token_weights("rows", targets, 2.0)
    assert (rows * targets).tolist() == pytest.approx([1 / 4, 1 / 4, 1 / 4, 0, 1 / 4])
    capped = token_weights("capped", targets, 2.0)
    assert (capped * targets).tolist() == pytest.approx([1 / 4, 1 / 4, 1 / 4, 0, 1 / 4])
    above = token_weights("capped", targets, 9.0)
    assert (above * targets).tolist() == pytest.approx([2 / 17, 2 / 17, 9 / 17, 0, 4 / 17])
    for mean in ("tokens", "rows", "capped"):
        assert np.isfinite(token_weights(mean, np.array([0, 0]), median_targets(np.array([0, 0])))).all()


def test_the_median_is_that_of_the_prepared_rows_whatever_a_scan_leaves_out():
    from safecl.planning.plans import TaskPlan, apply_screening, order_of_rows

    config, rows = scenes.run_config(), scenes.random_dataset(60, seed=1)
    task = TaskPlan(config.tasks[0], rows, 160, order_of_rows(config.train, rows, 160))
    targets = task.dataset.num_targets
    assert task.median_targets == statistics.median(targets[targets > 0].tolist())
    before, long = task.median_targets, task.dataset.row_ids[targets > task.median_targets]
    apply_screening(config, task, {"rows": long.tolist(), "weight": 0.0})
    assert len(task.dataset) < len(targets) and task.median_targets == before
