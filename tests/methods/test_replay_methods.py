"""DER++ and A-GEM train the same numbers as plain PyTorch, on two ranks."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.engine.passes import oracle
from tests.engine.passes.test_equality import memory_of
from tests.engine.scenes import random_dataset, run_config, state_of, tiny_model
from tests.methods import reference, scenes

STEPS, TOKENS = 8, 160


def drawn(memory, stream: str, steps: int = STEPS, tokens: int = 40):
    return [[memory.get(key).row for key in memory.draw(step, tokens, stream)] for step in range(steps)]


def task_rows(data, steps: int = STEPS, tokens: int = TOKENS):
    from safecl.data import TaskOrder

    order = TaskOrder(data, seed=reference.SEED, tokens_per_batch=tokens, max_steps=steps)
    return [data.rows(order.rows_of_step(step)) for step in range(steps)]


# ---------------------------------------------------------------------------------------------------------------- DER++


def expected_derpp(alpha: float, beta: float, k: int, second: str = "replay2"):
    model = tiny_model()
    teacher = copy.deepcopy(model)
    memory = memory_of(random_dataset(20, seed=2))
    steps = list(
        zip(task_rows(random_dataset(60, seed=1)), drawn(memory, "replay"), drawn(memory, second), strict=True)
    )

    def distance(rows):
        with torch.no_grad():
            said = [reference.log_probs(teacher, row, 1.0) for row in rows]
        now = [reference.log_probs(model, row, 1.0) for row in rows]
        return torch.cat([reference.topk_kl(t, s, k) for t, s in zip(said, now, strict=True)]).mean()

    losses = [
        lambda rows=rows, first=first, other=other: (
            reference.mean_nll(model, rows) + alpha * distance(first).float() + beta * reference.mean_nll(model, other)
        )
        for rows, first, other in steps
    ]
    return reference.train(model, losses)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_derpp_equals_plain_pytorch(rank_pool, stage):
    start = {name: p.detach() for name, p in tiny_model().named_parameters()}
    methods = {"derpp": {"alpha": 2.0, "beta": 0.5}}
    found = rank_pool(2).run(scenes.train, steps=STEPS, methods=methods, deepspeed={"stage": stage})[0]["weights"]
    assert oracle.relative_distance(found, expected_derpp(2.0, 0.5, k=8), start) <= 1e-3
    if stage == 1:
        assert (
            oracle.relative_distance(found, expected_derpp(2.0, 0.5, k=8, second="replay"), start) > 1e-2
        )  # the draws are two


# ---------------------------------------------------------------------------------------------------------------- A-GEM


def train_agem(steps: int, **changes):
    """Weights after each step's A-GEM, and what each projection saw: cosine before and after, by independent dot
    products."""
    from safecl.engine.passes.training_engine import TrainingEngine
    from safecl.methods.projections import agem

    config = run_config(memory={"source": "unused", "replay_ratio": 0.5}, methods={"agem": {}}, **changes)
    run, (task,) = scenes.make_run(
        config, scenes.undecided_model(), [scenes.conflicting_datasets()[0]], scenes.conflicting_datasets()[1]
    )
    run.begin_task(task, active=True)
    cosines = []

    def cosine(shards) -> float:
        sums = torch.zeros(3, dtype=torch.float64)
        for shard in shards:
            g, r = shard.grad.double().flatten(), shard.state[agem.MEMORY_GRADIENT].double().flatten()
            sums += torch.stack([g @ r, g @ g, r @ r])
        if run.engine.shards.stage > 0:
            torch.distributed.all_reduce(sums)
        return float(sums[0] / (sums[1] * sums[2]).sqrt())

    original = agem.Method.transform_gradient

    def watched(method, run, shards):
        before = cosine(shards)
        original(method, run, shards)
        cosines.append((before, cosine(shards)))

    agem.Method.transform_gradient = watched
    try:
        for _ in range(steps):
            run.train_step(task)
    finally:
        agem.Method.transform_gradient = original
    assert isinstance(run.engine, TrainingEngine)
    return cosines, state_of(run)["weights"]


def expected_agem(steps: int):
    model = scenes.undecided_model()
    task, memory = scenes.conflicting_datasets()
    replayed = drawn(memory_of(memory), "agem", steps, tokens=80)

    def project(step, grads):
        r = oracle.gradients(model, reference.mean_nll(model, replayed[step]))
        gr = sum(float((grads[n].double() * r[n].double()).sum()) for n in r)
        rr = sum(float((r[n].double() ** 2).sum()) for n in r)
        return grads if gr >= 0 else {n: grads[n] - gr / rr * r[n] for n in r}

    losses = [lambda rows=rows: reference.mean_nll(model, rows) for rows in task_rows(task, steps)]
    return reference.train(model, losses, transform=project)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_agem_leaves_no_gradient_against_the_memory_and_equals_plain_pytorch(rank_pool, stage):
    start = {name: p.detach() for name, p in scenes.undecided_model().named_parameters()}
    cosines, weights = rank_pool(2).run(train_agem, steps=6, deepspeed={"stage": stage})[0]
    conflicts = [(before, after) for before, after in cosines if before < -0.05]
    assert len(conflicts) >= 3, cosines
    assert all(after >= -1e-5 for _, after in conflicts), conflicts
    assert all(before == after for before, after in cosines if before >= 0)
    assert oracle.relative_distance(weights, expected_agem(6), start) <= 1e-3


@pytest.mark.parametrize(
    ("margin", "gradient", "memory", "projected"),
    [
        (0.0, [3.0, 1.0], [1.0, 0.0], False),
        (0.0, [-3.0, 1.0], [2.0, 0.0], True),
        (0.5, [0.01, 0.01], [0.02, 0.0], False),  # a cosine of 0.71, whatever the lengths
        (0.9, [100.0, 100.0], [200.0, 0.0], True),
        (-0.9, [-3.0, 3.0], [1.0, 0.0], False),  # a cosine of -0.71
        (1.0, [3.0, 1.0], [1.0, 0.0], True),
    ],
)
def test_the_margin_of_agem_is_a_cosine_below_which_the_gradient_is_made_orthogonal(
    margin, gradient, memory, projected
):
    from types import SimpleNamespace

    from safecl.methods.projections import agem

    shards = [  # two of them: the cosine is that of the whole
        SimpleNamespace(grad=torch.tensor([g]), state={agem.MEMORY_GRADIENT: torch.tensor([r])})
        for g, r in zip(gradient, memory, strict=True)
    ]
    dots = lambda shards, pairs: torch.stack([sum((a(s) * b(s)).sum() for s in shards) for a, b in pairs]).double()  # noqa: E731
    run = SimpleNamespace(dots=dots, memory_gradient=lambda kind, draw: True, log=lambda message: None, num_steps=1)
    method = agem.Method("agem", agem.Config(margin=margin))
    method.start_task(run)
    method.before_step(run)
    method.transform_gradient(run, shards)
    found = torch.cat([shard.grad for shard in shards])
    assert found.tolist() == pytest.approx([0.0, gradient[1]] if projected else gradient)
