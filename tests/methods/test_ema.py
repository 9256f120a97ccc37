"""What the forms of the average keep over a sequence of tasks, and how far back they reach."""

from __future__ import annotations

import pytest
import torch

from safecl.methods.averages.ema import Config
from tests.engine.passes import oracle
from tests.engine.scenes import random_dataset, tiny_model
from tests.methods import reference, scenes
from tests.methods.test_replay_methods import task_rows

STEPS, EVERY = 5, 2
"""The last step of a task is no write-back, so that the weights that it hands over are not the slow ones."""


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def expected_write_back(write_back: str, eta: float):
    """Weights at the start and after each of two tasks in plain PyTorch; what is mixed in every EVERY steps is
    `kept`."""
    model = tiny_model()
    history, theta_0 = [weights_of(model)], weights_of(model)
    for seed in (1, 4):
        kept = (
            theta_0 if write_back == "anchor" else weights_of(model)
        )  # slow weights begin anew with a task, theta_0 stays

        def loss(step, rows, kept=kept):
            if step and step % EVERY == 0:  # what the step before ended with
                mix(model, kept)
            return reference.mean_nll(model, rows)

        def mix(model, kept):
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(eta * kept[name] + (1 - eta) * p)
                    if write_back == "slow":
                        kept[name] = p.detach().clone()

        rows = task_rows(random_dataset(60, seed=seed), STEPS)
        history.append(reference.train(model, [lambda i=i, r=r, loss=loss: loss(i, r) for i, r in enumerate(rows)]))
    return history


@pytest.mark.parametrize(("write_back", "eta", "stage"), [("slow", 0.3, 2), ("anchor", 0.3, 3)])
def test_slow_weights_begin_anew_with_a_task_and_the_pull_stays_with_the_aligned_model(
    rank_pool, write_back, eta, stage
):
    start, first, second = expected_write_back(write_back, eta)
    methods = {"ema": {"decay": eta, "write_back": write_back, "every": EVERY}}
    history, _ = rank_pool(2).run(scenes.train_sequence, steps=STEPS, methods=methods, deepspeed={"stage": stage})[0]
    assert oracle.relative_distance(history[0]["weights"], first, start) <= 1e-3
    assert oracle.relative_distance(history[1]["weights"], second, first) <= 1e-3


def test_the_horizon_is_the_averages_memory_as_a_share_of_the_run():
    assert Config(horizon=0.25).decay_for(400) == pytest.approx(1 - 1 / 100)
    assert Config().decay_for(1000) == Config(horizon=0.3).decay_for(1000) == pytest.approx(1 - 1 / 300)
    assert Config().weight_on_start(1000) == pytest.approx(0.0355, abs=2e-4)  # the 4 % of its documentation
    assert Config(horizon=0.3).decay_for(2) == 0.0 and Config(decay=0.9).decay_for(5) == 0.9
