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


REHEARSAL = {"er": {"weight": 0.5}, "der": {"alpha": 2.0}, "derpp": {"alpha": 2.0, "beta": 0.5}}


def rehearsal(name: str):
    """The loss of (model, first draw, second draw) that the term is added to."""
    teacher = tiny_model()

    def distance(model, rows) -> torch.Tensor:
        return reference.stored_kl(teacher, model, rows, 8).float()

    return {
        "er": lambda model, first, second: 0.5 * reference.mean_nll(model, first),
        "der": lambda model, first, second: 2.0 * distance(model, first),
        "derpp": lambda model, first, second: 2.0 * distance(model, first) + 0.5 * reference.mean_nll(model, second),
    }[name]


def expected_information(method: str, reading: str, weight: float, labels: str) -> dict:
    ids, rehearsed, model = [answer_ids(letter)[0] for letter in labels], rehearsal(method), tiny_model()
    memory = memory_of(random_dataset(20, seed=2))

    def loss(own, more, second) -> torch.Tensor:
        p = torch.stack([reference.log_probs(model, row, 1.0)[0, ids].softmax(-1) for row in more if row.num_targets])
        entropy = torch.special.entr(p).sum(-1).mean()
        marginal = torch.special.entr(p.mean(0)).sum()
        term = entropy - marginal if reading == "both" else -marginal
        return reference.mean_nll(model, own) + rehearsed(model, more, second) + weight * term.float()

    rows = task_rows(random_dataset(60, seed=1), STEPS)
    draws = (drawn(memory, stream, STEPS, 40) for stream in ("replay", "replay2"))
    return reference.train(model, [lambda step=step: loss(*step) for step in zip(rows, *draws, strict=True)])


@pytest.mark.parametrize(
    ("method", "reading", "stage"),
    [("er", "both", 3), ("er", "marginal", 1), ("der", "both", 2), ("derpp", "marginal", 3)],
)
def test_information_has_the_gradient_of_its_formula_over_the_whole_step(rank_pool, method, reading, stage):
    methods = {method: REHEARSAL[method], "im": {"weight": 3.0, "labels": ["a", "f", "z"], "reading": reading}}
    found = rank_pool(2).run(scenes.train, steps=STEPS, methods=methods, deepspeed={"stage": stage})[0]
    assert error(found, expected_information(method, reading, 3.0, "afz")) <= 1e-3
    assert error(found, expected_information(method, reading, 0.0, "afz")) > 1e-2
    other = "marginal" if reading == "both" else "both"
    assert error(found, expected_information(method, other, 3.0, "afz")) > 1e-2


def test_information_from_the_models_own_logits_falls_as_well(rank_pool):
    methods = {"im": {"weight": 3.0, "labels": ["a", "f"]}}
    found = rank_pool(2).run(scenes.train, steps=4, methods=methods, model=LORA_ON_HEAD)[0]
    assert not found["fused"] and found["losses"][-1]["im"] < found["losses"][0]["im"] - 1e-3
