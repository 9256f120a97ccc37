"""EWC with LoRA: the merged weights are pulled by the dense Fisher, on every rank count, in every stage."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.engine.fisher.fisher_scenes import write_random_fisher
from tests.engine.passes import oracle
from tests.engine.scenes import random_dataset, run_config, tiny_model
from tests.methods import reference, scenes
from tests.methods.test_lwf import CHECKPOINTED, LORA
from tests.methods.test_replay_methods import task_rows

STEPS, STRENGTH = 6, 200.0


@pytest.fixture(scope="module")
def fisher(tmp_path_factory) -> tuple[str, dict[str, torch.Tensor]]:
    path = str(tmp_path_factory.mktemp("fisher") / "fisher.safetensors")
    return path, write_random_fisher(path)


@functools.cache
def start_and_steps():
    model = scenes.with_adapters(tiny_model(), run_config(model=LORA))
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return model.state_dict(), start, task_rows(random_dataset(60, seed=1), STEPS)


def expected(weights: dict[str, torch.Tensor] | None):
    """(start, end): the penalty of the merged weights' movement, from whole dense products."""
    state, start, steps = start_and_steps()
    model = scenes.with_adapters(tiny_model(), run_config(model=LORA))
    model.load_state_dict(state)
    inner, scale = model.get_base_model(), LORA["lora"]["alpha"] / LORA["lora"]["r"]
    layers = {f"{n}.weight": m for n, m in inner.named_modules() if hasattr(m, "lora_A")}

    def loss(rows):
        total = reference.mean_nll(inner, rows)
        for name, layer in layers.items() if weights is not None else ():
            product = scale * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            total = total + 0.5 * STRENGTH * (weights[name] * product**2).sum()
        return total

    return start, reference.train(model, [lambda rows=rows: loss(rows) for rows in steps])


@pytest.mark.parametrize(
    ("ranks", "stage", "optimizer", "model"),
    [(2, 0, "none", LORA), (1, 1, "none", LORA), (2, 2, "cpu", LORA), (2, 3, "none", CHECKPOINTED)],
)
def test_ewc_with_lora_equals_plain_pytorch_with_whole_products(rank_pool, fisher, ranks, stage, optimizer, model):
    path, weights = fisher
    deepspeed = {"stage": stage, "offload": {"optimizer": optimizer, "fisher": optimizer}}
    methods = {"ewc": {"strength": STRENGTH, "fisher": path}}
    found = rank_pool(ranks).run(
        scenes.train, steps=STEPS, memory=None, methods=methods, deepspeed=deepspeed, model=model
    )[0]
    start, end = expected(weights)
    assert oracle.relative_distance({name: found["weights"][name] for name in end}, end, start) <= 1e-3
    assert oracle.relative_distance({name: found["weights"][name] for name in end}, expected(None)[1], start) > 1e-2
    even = {name: torch.ones_like(value) for name, value in weights.items()}
    assert oracle.relative_distance({name: found["weights"][name] for name in end}, expected(even)[1], start) > 1e-2
    assert found["losses"][0]["adapter_penalty"] == 0.0 < found["losses"][2]["adapter_penalty"]


def test_it_adds_up_with_an_even_pull(rank_pool, fisher):
    path, weights = fisher
    methods = {"ewc": {"strength": STRENGTH, "fisher": path}, "l2_sp": {"strength": 20.0}}
    found = rank_pool(2).run(scenes.train, steps=STEPS, memory=None, methods=methods, model=LORA)[0]
    start, end = expected({name: value + 20.0 / STRENGTH for name, value in weights.items()})
    assert oracle.relative_distance({name: found["weights"][name] for name in end}, end, start) <= 1e-3


def share_of_rows(path: str) -> dict[str, tuple[int, int]]:
    config = run_config(memory=None, methods={"ewc": {"fisher": path}}, model=LORA)
    run, (task,) = scenes.make_run(config, scenes.with_adapters(tiny_model(), config), [random_dataset(60, seed=1)])
    run.begin_task(task, active=True)
    (pull,) = (run.penalties.pull_of(penalty) for penalty in run.penalties.of(run.active_methods))
    return {name: (first, first + len(values)) for name, (first, values) in pull.shares.items()}


def test_each_rank_holds_only_its_share_of_the_fisher(rank_pool, fisher):
    first, second = rank_pool(2).run(share_of_rows, path=fisher[0])
    for name, weights in fisher[1].items():
        if name in first:
            assert (first[name][0], first[name][1], second[name][1]) == (0, second[name][0], weights.shape[0])
