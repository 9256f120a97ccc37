"""Temporal ensembles, and the control arm of averages that are written back."""

from __future__ import annotations

import pytest
import torch

from safecl.methods.averages.temporal_ensemble import Config
from tests.engine.passes import oracle
from tests.engine.scenes import random_dataset, run_config, tiny_model
from tests.methods import scenes

STEPS = 6


def weights_by_step(**changes) -> list[dict]:
    """The whole state after every step."""
    config = run_config(memory=None, **changes)
    run, (task,) = scenes.make_run(config, tiny_model(), [random_dataset(60, seed=1)])
    run.begin_task(task, active=True)
    states = []
    for _ in range(STEPS):
        run.train_step(task)
        states.append(scenes.state_of(run))
    return states


def test_a_temporal_ensemble_is_the_average_with_rising_decays(rank_pool):
    settings = {"decay": 0.8, "first_decay": 0.2, "warmup": 0.4}
    found = rank_pool(2).run(weights_by_step, methods={"temporal_ensemble": settings}, deepspeed={"stage": 3})[0]
    start = {name: p.detach().double() for name, p in tiny_model().named_parameters()}
    average = dict(start)
    for step, state in enumerate(found):
        eta = 0.2 + 0.6 * min(1.0, step / 4)
        average = {name: eta * average[name] + (1 - eta) * state["weights"][name].double() for name in average}
    assert oracle.relative_distance(found[-1]["ema"], average, start) <= 1e-3


def test_the_share_of_the_start_in_a_temporal_ensemble_is_the_product_of_its_decays():
    config = Config(decay=0.5, first_decay=0.25, warmup=0.5)
    assert [config.decay_at(step, 4) for step in range(4)] == [0.25, 0.375, 0.5, 0.5]
    assert config.weight_on_start(4) == pytest.approx(0.25 * 0.375 * 0.25)
    assert Config(warmup=0.0).decay_at(0, 4) == 0.99


def test_the_control_arm_is_the_smaller_learning_rate_bitwise(rank_pool):
    train = {"learning_rate": 8e-3, "weight_decay": 0.1}
    control = rank_pool(1).run(weights_by_step, methods={"ema_control": {"decay": 0.75}}, train=train)[0][-1]
    smaller = rank_pool(1).run(weights_by_step, methods={}, train=train | {"learning_rate": 2e-3})[0][-1]
    assert all(torch.equal(control["weights"][name], value) for name, value in smaller["weights"].items())
