"""SafeInstruct and information maximisation train the same numbers as their equations in plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from tests.engine.passes import oracle
from tests.engine.passes.test_equality import memory_of
from tests.engine.scenes import answer_ids, random_dataset, tiny_model
from tests.methods import reference, scenes
from tests.methods.test_lwf import LORA_ON_HEAD
from tests.methods.test_replay_methods import drawn, task_rows

STEPS = 5


def error(found: dict, end: dict) -> float:
    start = {name: p.detach() for name, p in tiny_model().named_parameters()}
    return oracle.relative_distance(found["weights"], end, start)


def expected(loss_of_step, stream: str, tokens: int) -> dict:
    """The end of training with a loss of (model, task rows, drawn rows)."""
    model = tiny_model()
    draws = drawn(memory_of(random_dataset(20, seed=2)), stream, STEPS, tokens)
    steps = zip(task_rows(random_dataset(60, seed=1), STEPS), draws, strict=True)
    return reference.train(model, [lambda own=own, more=more: loss_of_step(model, own, more) for own, more in steps])


# --------------------------------------------------------------------------------------------------------- SafeInstruct


def one_mean_over_both(mean: str):
    def loss(model, own, more) -> torch.Tensor:
        if mean == "tokens":
            return reference.mean_nll(model, [*own, *more])
        return torch.stack([oracle.row_nll(model, row).mean() for row in [*own, *more]]).mean()

    return loss


@pytest.mark.parametrize(("stage", "mean"), [(2, "tokens"), (3, "rows")])
def test_safe_instruct_is_one_mean_over_the_rows_of_task_and_memory(rank_pool, stage, mean):
    found = rank_pool(2).run(
        scenes.train,
        steps=STEPS,
        methods={"safe_instruct": {"share": 0.2}},
        train={"loss_mean": mean},
        deepspeed={"stage": stage},
    )[0]
    assert error(found, expected(one_mean_over_both(mean), "safe_instruct", 32)) <= 1e-3
    assert error(found, expected(lambda model, own, more: reference.mean_nll(model, own), "safe_instruct", 32)) > 1e-2


# --------------------------------------------------------------------------------------------- information maximisation


def information(reading: str, weight: float, labels: str):
    ids = [answer_ids(letter)[0] for letter in labels]

    def loss(model, own, more) -> torch.Tensor:
        p = torch.stack([reference.log_probs(model, row, 1.0)[0, ids].softmax(-1) for row in more if row.num_targets])
        entropy = torch.special.entr(p).sum(-1).mean()
        marginal = torch.special.entr(p.mean(0)).sum()
        term = entropy - marginal if reading == "both" else -marginal
        return reference.mean_nll(model, own) + 0.5 * reference.mean_nll(model, more) + weight * term.float()

    return loss


@pytest.mark.parametrize(("reading", "stage"), [("both", 3), ("marginal", 1)])
def test_information_has_the_gradient_of_its_formula_over_the_whole_step(rank_pool, reading, stage):
    methods = {"er": {"weight": 0.5}, "im": {"weight": 3.0, "labels": ["a", "f", "z"], "reading": reading}}
    found = rank_pool(2).run(scenes.train, steps=STEPS, methods=methods, deepspeed={"stage": stage})[0]
    assert error(found, expected(information(reading, 3.0, "afz"), "replay", 40)) <= 1e-3
    assert error(found, expected(information(reading, 0.0, "afz"), "replay", 40)) > 1e-2
    other = "marginal" if reading == "both" else "both"
    assert error(found, expected(information(other, 3.0, "afz"), "replay", 40)) > 1e-2


def test_information_from_the_models_own_logits_falls_as_well(rank_pool):
    methods = {"im": {"weight": 3.0, "labels": ["a", "f"]}}
    found = rank_pool(2).run(scenes.train, steps=4, methods=methods, model=LORA_ON_HEAD)[0]
    assert not found["fused"] and found["losses"][-1]["im"] < found["losses"][0]["im"] - 1e-3
