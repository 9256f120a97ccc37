"""LDIFS trains the same numbers as plain PyTorch with a frozen copy of the model, at any layers and by any teacher."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from safecl.config import ConfigError
from tests.engine.passes import oracle
from tests.engine.scenes import random_dataset, run_config, tiny_model
from tests.methods import reference, scenes
from tests.methods.test_lwf import CHECKPOINTED, LORA_ON_HEAD
from tests.methods.test_replay_methods import task_rows

STEPS = 4
WEIGHT = 30.0


def features(model, row, layers: list[int]) -> torch.Tensor:
    """fp32 hidden states of the layers side by side, by hooks on the layers and on the final norm: [tokens, n * H]."""
    found: dict[int, torch.Tensor] = {}
    places = {number + 1: layer for number, layer in enumerate(model.model.layers)}
    places[len(places)] = model.model.norm

    def noting(number: int):
        def note(module, inputs, output) -> None:
            found[number] = (output[0] if isinstance(output, tuple) else output)[0]

        return note

    hooks = [places[number].register_forward_hook(noting(number)) for number in layers]
    model.model(input_ids=reference.ids_of(row), use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.cat([found[number] for number in layers], dim=-1)


@functools.cache
def expected(layers: tuple[int, ...], tokens: str | int, weight: float, model: str = "full"):
    student = tiny_model()
    teacher = copy.deepcopy(student)
    if model != "full":
        student = scenes.with_adapters(student, run_config(model={"lora": CHECKPOINTED, "head": LORA_ON_HEAD}[model]))
    inner = student if model == "full" else student.get_base_model()
    start = {name: p.detach().clone() for name, p in student.named_parameters() if p.requires_grad}

    def distance(row) -> torch.Tensor:
        with torch.no_grad():
            said = features(teacher, row, layers)
        square = (features(inner, row, layers) - said).square().mean(-1)
        if tokens == "all":
            return square
        supervised = square[:-1][torch.from_numpy(row.loss_mask[1:].copy())]
        return supervised if tokens == "supervised" else supervised[:tokens]

    losses = [
        lambda rows=rows: reference.mean_nll(inner, rows) + weight * torch.cat([distance(row) for row in rows]).mean()
        for rows in task_rows(random_dataset(60, seed=1), STEPS)
    ]
    return start, reference.train(student, losses)


def error(found: dict, *case) -> float:
    start, end = expected(*case)
    return oracle.relative_distance({name: found["weights"][name] for name in end}, end, start)


@pytest.mark.parametrize(
    ("layers", "outputs", "tokens", "stage"),
    [(2, "online", "all", 3), ([-2, 2], "recorded", "supervised", 2), (2, "recorded", 2, 1), (2, "online", 2, 3)],
)
def test_ldifs_equals_a_frozen_copy(rank_pool, tmp_path, layers, outputs, tokens, stage):
    tiny_model().save_pretrained(tmp_path / "model")
    settings = {"weight": WEIGHT, "layers": layers, "outputs": outputs, "tokens": tokens}
    found = rank_pool(2).run(
        scenes.train,
        steps=STEPS,
        model={"path": str(tmp_path / "model"), "dtype": "fp32", "gradient_checkpointing": False},
        memory=None,
        methods={"ldifs": settings},
        deepspeed={"stage": stage},
        output=str(tmp_path),
    )[0]
    assert error(found, (1, 2), tokens, WEIGHT) <= 1e-3
    assert error(found, (2,), tokens, WEIGHT) > 1e-2  # the layers matter
    assert error(found, (1, 2), "supervised" if tokens != "supervised" else "all", WEIGHT) > 1e-2  # and the tokens
    assert abs(found["losses"][0]["ldifs"]) < 1e-6 < min(losses["ldifs"] for losses in found["losses"][1:])


@pytest.mark.parametrize(("model", "name", "stage"), [(CHECKPOINTED, "lora", 3), (LORA_ON_HEAD, "head", 2)])
def test_ldifs_with_lora_takes_the_model_without_adapters_as_teacher(rank_pool, tmp_path, model, name, stage):
    found = rank_pool(2).run(
        scenes.train,
        steps=STEPS,
        model=model,
        memory=None,
        methods={"ldifs": {"weight": WEIGHT, "layers": 2}},
        deepspeed={"stage": stage},
        output=str(tmp_path),
    )[0]
    assert error(found, (1, 2), "all", WEIGHT, name) <= 1e-3


def test_a_rank_without_rows_makes_the_same_calls_as_the_others(rank_pool):
    """Steps of one row: under ZeRO-3 the ranks must agree on the hidden states that have a gradient."""
    few = {"tokens_per_batch": 4}
    one, two = (
        rank_pool(ranks).run(
            scenes.train,
            steps=2,
            model=CHECKPOINTED,
            memory=None,
            methods={"ldifs": {"weight": WEIGHT, "layers": 2}},
            deepspeed={"stage": 3},
            train=few,
        )[0]
        for ranks in (1, 2)
    )
    start = expected((1, 2), "all", WEIGHT, "lora")[0]
    trained = [{name: found["weights"][name] for name in start} for found in (one, two)]
    assert oracle.relative_distance(*trained, start) <= 1e-3


def test_layers_are_chosen_at_equal_distances_or_by_their_numbers():
    from safecl.engine.model.features import layer_numbers

    assert layer_numbers(5, 32) == (7, 13, 20, 26, 32)
    assert layer_numbers(1, 32) == layer_numbers((), 32) == layer_numbers([-1], 32) == ()
    assert layer_numbers(9, 3) == (1, 2, 3)
    assert layer_numbers([-1, 4, 32], 32) == (4, 32)
    with pytest.raises(ConfigError, match=r"methods.ldifs.layers: 33 is no layer; the model has layers 1 to 32"):
        layer_numbers([33], 32, "methods.ldifs.layers")
    with pytest.raises(ConfigError, match="0 is no layer"):
        layer_numbers([0], 32)
