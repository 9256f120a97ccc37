"""`gradient_pass` with each of its actions, on two ranks in every ZeRO stage, against plain PyTorch."""

from __future__ import annotations

import functools
import math
from unittest import mock

import pytest
import torch

from tests.engine import scenes
from tests.engine.passes import oracle
from tests.engine.passes.test_equality import rows_of_steps

STAGES = [0, 1, 2, 3]
RHO = 0.3


@functools.cache
def expected() -> dict:
    """Gradients of two sets of rows, and of the second at weights that are perturbed along the first."""
    model = scenes.tiny_model()
    (first, _), (second, _) = rows_of_steps(2)
    mean = lambda rows: torch.cat([oracle.row_nll(model, row) for row in rows]).mean()  # noqa: E731
    a, b = oracle.gradients(model, mean(first)), oracle.gradients(model, mean(second))
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in a.values()))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(a[name], alpha=RHO / norm)
    perturbed = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {"a": a, "b": b, "perturbed": perturbed, "b_perturbed": oracle.gradients(model, mean(second))}


def use_all_primitives(**changes) -> dict:
    """The engine's results for the same, by name, and whether weights and moments stayed where they must."""
    run, task = scenes.make_run(scenes.run_config(memory=None, **changes))
    engine, optimizer, shards = run.engine, run.engine.optimizer, run.engine.shards
    start = scenes.state_of(run)["weights"]
    first = run.step_rows(task)
    run.step = 1
    second = run.step_rows(task)

    def state(kind: str) -> dict:
        return {name: shards.read(name, optimizer.tensors(kind)) for name in shards.shapes}

    found = {}
    optimizer.new_state("squares")
    for name, rows, weight in (("a", first, 0.5), ("b", second, 2.0)):
        engine.gradient_pass(rows, engine.stash(name))
        engine.gradient_pass(rows, engine.accumulate_fisher("squares", weight))
        found[name] = state(name)
    found["squares"] = state("squares")
    found["dots"] = engine.dots(
        run.view.shards(), [(lambda s: s.state["a"], lambda s: s.state["b"]), (lambda s: s.state["a"],) * 2]
    ).tolist()
    (per_tensor,) = engine.dots_per_tensor(run.view.shards(), [(lambda s: s.state["a"], lambda s: s.state["b"])])
    found["per_tensor"] = dict(zip(shards.shapes, per_tensor.tolist(), strict=True))
    per_row = engine.dots_per_row(
        run.view.shards(), [(lambda s: s.state["a"], lambda s: s.state["b"]), (lambda s: s.state["a"],) * 2]
    )
    found["per_row"] = {name: rows.clone() for name, rows in zip(shards.shapes, per_row, strict=True)}
    engine.gradient_pass(first, engine.perturb(RHO))
    found["perturbed"] = scenes.state_of(run)["weights"]
    engine.gradient_pass(second, engine.restore(engine.stash("b_perturbed")))
    found["b_perturbed"] = state("b_perturbed")
    engine.perturb_along("a", RHO)
    found["moved"] = scenes.state_of(run)["weights"]
    engine.gradient_pass(second, engine.stash("b_moved"))
    found["b_moved"] = state("b_moved")
    engine.put_back()
    end = scenes.state_of(run)["weights"]
    engine.gradient_pass(second, engine.stash("b_again"))
    again = state("b_again")
    found["restored"] = all(torch.equal(start[name], end[name]) for name in start)
    found["live_restored"] = all(torch.equal(found["b"][name], again[name]) for name in again)
    found["kinds"] = sorted(run.view.shards()[0].state)
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_stash_fisher_dots_and_perturbation_equal_plain_pytorch(rank_pool, stage):
    offload = {"optimizer": "cpu" if stage == 2 else "none"}
    found = rank_pool(2).run(use_all_primitives, deepspeed={"stage": stage, "offload": offload})[1]
    want = expected()
    for kind in ("a", "b", "perturbed", "b_perturbed"):
        assert oracle.relative_distance(found[kind], want[kind]) <= 1e-5, kind
    for kind, same in (("moved", "perturbed"), ("b_moved", "b_perturbed")):
        assert oracle.relative_distance(found[kind], want[same]) <= 1e-5, kind
    assert oracle.relative_distance(want["b_perturbed"], want["b"]) > 0.05  # the perturbation matters
    squares = {name: 0.5 * want["a"][name] ** 2 + 2.0 * want["b"][name] ** 2 for name in want["a"]}
    assert oracle.relative_distance(found["squares"], squares) <= 1e-5
    per_tensor = {name: float((want["a"][name].double() * want["b"][name].double()).sum()) for name in want["a"]}
    assert found["per_tensor"] == pytest.approx(per_tensor, rel=1e-4, abs=1e-7)
    for name, rows in found["per_row"].items():
        a, b = (want[kind][name].double().view(rows.shape[1], -1) for kind in ("a", "b"))
        assert rows.shape[1] == (len(want["a"][name]) if want["a"][name].dim() > 1 else 1)
        assert oracle.relative_distance({"": rows[0]}, {"": (a * b).sum(1)}) <= 1e-4, name
        assert oracle.relative_distance({"": rows[1]}, {"": (a * a).sum(1)}) <= 1e-4, name
    length = sum(float((g.double() ** 2).sum()) for g in want["a"].values())
    assert found["dots"] == pytest.approx([sum(per_tensor.values()), length], rel=1e-5)
    assert found["restored"] and found["live_restored"]
    assert found["kinds"] == [
        "a",
        "b",
        "b_again",
        "b_moved",
        "b_perturbed",
        "squares",
    ]  # no moments: nothing was an update


def sharpness_aware_steps(steps: int, **changes):
    run, task = scenes.make_run(scenes.run_config(memory=None, **changes))
    for _ in range(steps):
        rows = run.step_rows(task)
        run.engine.gradient_pass(rows, run.engine.perturb(RHO))
        run.engine.gradient_pass(rows, run.engine.restore(run.engine.update(run.update_plan())))
        run.step += 1
    return scenes.state_of(run)["weights"]


@functools.cache
def expected_sharpness_aware(steps: int):
    from tests.methods import reference

    model = scenes.tiny_model()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [rows for rows, _ in rows_of_steps(steps)]

    def at_the_worst_point(step, grads):
        norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in grads.values()))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(grads[name], alpha=RHO / norm)
        there = oracle.gradients(model, reference.mean_nll(model, rows[step]))
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(before[name])
        return there

    losses = [lambda rows=rows: reference.mean_nll(model, rows) for rows in rows]
    return start, reference.train(model, losses, transform=at_the_worst_point)


@pytest.mark.parametrize("stage", [0, 3])
def test_an_update_at_restored_weights_is_a_step_of_sharpness_aware_minimisation(rank_pool, stage):
    start, end = expected_sharpness_aware(4)
    found = rank_pool(2).run(sharpness_aware_steps, steps=4, deepspeed={"stage": stage})[0]
    assert oracle.relative_distance(found, end, start) <= 1e-3


def passes_without_a_finite_gradient(**changes):
    """Each action with a gradient that is NaN on rank 1: what was applied, and whether anything changed."""
    run, task = scenes.make_run(scenes.run_config(memory=None, **changes))
    engine, rows, losses = run.engine, run.step_rows(task), run.engine.module.losses
    start = scenes.state_of(run)["weights"]
    engine.optimizer.new_state("squares")

    def poisoned(then) -> bool:
        bad = lambda **inputs: (  # noqa: E731
            (out := losses(**inputs)) | {"loss": out["loss"] * (math.nan if engine.rank == 1 else 1.0)}
        )
        with mock.patch.object(engine.module, "losses", bad):
            engine.gradient_pass(rows, then)
        return engine.optimizer.result.applied

    applied = [
        poisoned(engine.stash("g")),
        poisoned(engine.accumulate_fisher("squares", 1.0)),
        poisoned(engine.perturb(RHO)),
    ]
    engine.gradient_pass(rows, engine.perturb(RHO))
    applied.append(poisoned(engine.restore(engine.update(run.update_plan()))))
    clean = all(bool((squares == 0).all()) for squares in engine.optimizer.tensors("squares"))
    end = scenes.state_of(run)["weights"]
    engine.gradient_pass(rows, engine.stash("g"))
    return (
        applied,
        clean and not engine.optimizer.has("_unperturbed"),
        all(torch.equal(start[n], end[n]) for n in start),
    )


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_is_kept_nowhere_and_perturbed_weights_are_put_back(rank_pool, stage):
    for applied, clean, restored in rank_pool(2).run(passes_without_a_finite_gradient, deepspeed={"stage": stage}):
        assert applied == [False] * 4
        assert clean and restored
