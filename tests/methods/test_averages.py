"""Temporal ensembles, slow weights that follow fast ones, and the control arm of averages that are written back."""

from __future__ import annotations

import copy

import pytest
import torch

from safecl.methods.averages.temporal_ensemble import Config
from tests.engine.passes import oracle
from tests.engine.scenes import random_dataset, run_config, tiny_model
from tests.methods import every_method, reference, scenes
from tests.methods.fp64_scene import Scene, Weights

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


def test_the_control_arm_is_an_average_that_is_written_back_after_every_step(compare):
    scene = Scene()
    end = scene.train(after=lambda step, old: scene.move(lambda name, p: 0.75 * old[name] + 0.25 * p))
    assert oracle.relative_distance(end, Scene().train(), scene.start) > 0.02
    compare(end, scene.start, ema_control={"decay": 0.75})


def fast_and_slow(weight: float, one_sided: bool = True) -> tuple[Weights, Weights, Weights]:
    """(start, fast weights, slow weights) of I-LoRA with decay 0.9, by a loop over two whole models."""
    scene = Scene()
    slow, rows = copy.deepcopy(scene.model), scene.draws("replay")

    def states(model, row) -> torch.Tensor:
        found = model(input_ids=reference.ids_of(row), use_cache=False, output_hidden_states=True).hidden_states
        return torch.stack(found[1:])[:, 0]  # [layers, tokens, H]

    def loss(step: int) -> torch.Tensor:
        distances = []
        for row in rows[step]:
            with torch.no_grad():
                target = states(slow, row)
            h = states(scene.model, row)
            target = torch.maximum(h.detach(), target) if one_sided else target
            distances.append((h - target).square().mean((0, 2)))
        replayed = reference.mean_nll(scene.model, rows[step])
        return reference.mean_nll(scene.model, scene.task[step]) + replayed + weight * torch.cat(distances).mean()

    def follow(step: int, old: Weights) -> None:
        share = min(0.9, 1.0 - 1.0 / (step + 1))
        with torch.no_grad():
            for p, fast in zip(slow.parameters(), scene.model.parameters(), strict=True):
                p.copy_(share * p + (1.0 - share) * fast)

    losses = [lambda step=step: loss(step) for step in range(every_method.STEPS)]
    fast = reference.train(scene.model, losses, after=follow)
    return scene.start, fast, {name: p.detach() for name, p in slow.named_parameters()}


def test_i_lora_pulls_only_what_is_below_the_slow_weights_hidden_states(compare):
    start, fast, slow = fast_and_slow(0.1)
    for other in (fast_and_slow(0.1, one_sided=False)[1], fast_and_slow(0.0)[1]):
        assert oracle.relative_distance(fast, other, start) > 0.02
    assert oracle.relative_distance(fast, slow, start) > 0.02
    compare(fast, start, 3, {"ema": slow}, i_lora={"decay": 0.9, "weight": 0.1})
