"""A step with penalties, clipping and non-finite gradients, through the real engine on two ranks."""

from __future__ import annotations

import math

import pytest
import torch

from tests.engine import scenes
from tests.engine.passes import oracle

EWC = {"strength": 2.0, "sign_batches": 4, "rows_per_batch": 4}


def steps_with(plan_changes: dict, num_penalties: int, steps: int = 3, **changes):
    """Weights after steps with L2 pulls (strengths 2 and 1) to an anchor away from the start, and the penalty that each
    step reported."""
    from safecl.engine.zero.update import UpdatePlan
    from safecl.methods.terms import Penalty

    run, task = scenes.make_run(scenes.run_config(**changes))
    run.view.set_anchor()
    for shard in run.view.shards():
        shard.state["anchor"].add_(0.05)
    seen = []
    for _ in range(steps):
        penalties = [Penalty(2.0), Penalty(1.0)][:num_penalties]
        plan = UpdatePlan(lr=1e-2, clip_norm=0.5, penalties=penalties, **plan_changes)
        losses = run.engine.gradient_pass(run.step_rows(task), run.engine.update(plan))
        run.step += 1
        run.global_step += 1
        seen.append(losses.totals()["penalty"])
    return scenes.state_of(run)["weights"], seen


def expected_steps(scope: str, strengths: list[float], steps: int = 3, proximal: bool = False):
    """The same by hand, where the loss's gradient is clipped alone or together with the pulls."""
    from tests.engine.passes.test_equality import rows_of_steps

    model = scenes.tiny_model()
    params = dict(model.named_parameters())
    anchor = {name: p.detach() + 0.05 for name, p in params.items()}
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in params.items()}
    seen, strength = [], sum(strengths)
    for t, (rows, _) in enumerate(rows_of_steps(steps), start=1):
        grads = oracle.gradients(model, torch.cat([oracle.row_nll(model, row) for row in rows]).mean())
        pulls = {name: strength * (p.detach() - anchor[name]) for name, p in params.items()}
        seen.append(sum(float((pull.double() ** 2).sum()) for pull in pulls.values()) / (2 * strength))
        clipped = {name: grads[name] + (pulls[name] if scope == "total" else 0) for name in params}
        clip = min(1.0, 0.5 / math.sqrt(sum(float((g.double() ** 2).sum()) for g in clipped.values())))
        with torch.no_grad():
            for name, p in params.items():
                g = clip * clipped[name] + (pulls[name] if scope == "task" and not proximal else 0)
                m, v = moments[name]
                m.mul_(0.9).add_(g, alpha=0.1)
                v.mul_(0.999).addcmul_(g, g, value=0.001)
                p.sub_(1e-2 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-4))
                if proximal:
                    w = 1e-2 * strength / (1 + 1e-2 * strength)
                    p.sub_(w * (p - anchor[name]))
    return {name: p.detach() for name, p in params.items()}, seen


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("scope", ["task", "total"])
@pytest.mark.parametrize("num_penalties", [1, 2])
def test_penalties_and_clipping_equal_the_formula(rank_pool, stage, scope, num_penalties):
    arguments = dict(
        plan_changes={"clip_scope": scope}, num_penalties=num_penalties, memory=None, deepspeed={"stage": stage}
    )
    weights, seen = rank_pool(2).run(steps_with, **arguments)[0]
    expected, penalties = expected_steps(scope, [2.0, 1.0][:num_penalties])
    start = {name: p.detach() for name, p in scenes.tiny_model().named_parameters()}
    assert oracle.relative_distance(weights, expected, start) <= 1e-3
    assert seen == pytest.approx(penalties, rel=1e-4)


def run_with_poisoned_steps(bad_steps: list[int], kind: str, steps: int = 4, **changes):
    """Weights before and after each step; in bad steps rank 1's loss is multiplied by infinity or NaN."""
    from unittest import mock

    from safecl.engine.passes.training_engine import TrainingEngine

    run, task = scenes.make_run(scenes.run_config(**changes))
    original = TrainingEngine._forward_backward

    def poisoned(engine, *arguments):
        if run.global_step in bad_steps and engine.rank == 1:
            with mock.patch.object(engine.module, "losses", _times(engine.module.losses, float(kind))):
                return original(engine, *arguments)
        return original(engine, *arguments)

    history = [scenes.state_of(run)]
    applied = []
    with mock.patch.object(TrainingEngine, "_forward_backward", poisoned):
        for _ in range(steps):
            run.train_step(task)
            applied.append(run.engine.optimizer.result.applied)
            history.append(scenes.state_of(run))
    return applied, history


def _times(losses, factor: float):
    def scaled(**inputs):
        output = losses(**inputs)
        return output | {"loss": output["loss"] * factor}

    return scaled


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all_and_changes_nothing(rank_pool, stage, kind):
    methods = {"ewc": EWC, "ema": {"decay": 0.9}}
    ranks = rank_pool(2).run(
        run_with_poisoned_steps, bad_steps=[1], kind=kind, methods=methods, deepspeed={"stage": stage}
    )
    for applied, history in ranks:
        assert applied == [True, False, True, True]
        for state in ("weights", "ema", "fisher", "anchor"):
            assert all(torch.equal(history[1][state][name], value) for name, value in history[2][state].items()), state
        assert any(not torch.equal(history[2]["weights"][name], value) for name, value in history[3]["weights"].items())


@pytest.mark.parametrize("stage", [0, 2])
def test_bf16_skips_as_well(rank_pool, stage):
    model = {"path": "unused", "dtype": "bf16", "gradient_checkpointing": False}
    applied, _ = rank_pool(2).run(
        run_with_poisoned_steps,
        bad_steps=[1],
        kind="nan",
        steps=3,
        memory=None,
        model=model,
        deepspeed={"stage": stage},
    )[0]
    assert applied == [True, False, True]


def test_slow_weights_are_written_back_every_k_steps(rank_pool):
    """Lookahead: phi <- eta phi + (1 - eta) theta, theta <- phi."""
    methods = {"ema": {"decay": 0.5, "write_back": "slow", "every": 2}}
    _, history = rank_pool(2).run(
        run_with_poisoned_steps, bad_steps=[], kind="nan", steps=2, memory=None, methods=methods
    )[0]
    _, free = rank_pool(2).run(run_with_poisoned_steps, bad_steps=[], kind="nan", steps=2, memory=None)[0]
    for name, start in history[0]["weights"].items():
        assert torch.allclose(
            history[2]["weights"][name], 0.5 * start + 0.5 * free[2]["weights"][name], rtol=1e-5, atol=1e-8
        )


def test_the_pull_to_the_anchor_mixes_the_start_in_every_k_steps(rank_pool):
    methods = {"ema": {"decay": 0.1, "write_back": "anchor", "every": 2}}
    _, history = rank_pool(2).run(
        run_with_poisoned_steps, bad_steps=[], kind="nan", steps=2, memory=None, methods=methods
    )[0]
    _, free = rank_pool(2).run(run_with_poisoned_steps, bad_steps=[], kind="nan", steps=2, memory=None)[0]
    for name, start in history[0]["weights"].items():
        assert torch.allclose(
            history[2]["weights"][name], 0.1 * start + 0.9 * free[2]["weights"][name], rtol=1e-5, atol=1e-8
        )


def tensors_given_huge_pages(**changes):
    """Addresses for which the engine asks huge pages, addresses of all tensors that the pass reads, and the number of
    requests after each step."""
    from unittest import mock

    from safecl.engine.zero.update import UpdatePlan

    run, task = scenes.make_run(scenes.run_config(**changes))
    run.view.set_anchor()
    asked: list[int] = []
    counts = []
    with mock.patch("safecl.engine.zero.shard.use_huge_pages", lambda tensor: asked.append(tensor.data_ptr())):
        for _ in range(2):
            run.engine.gradient_pass(run.step_rows(task), run.engine.update(UpdatePlan(lr=1e-2)))
            run.step += 1
            run.global_step += 1
            counts.append(len(asked))
    streamed = [tensor.data_ptr() for shard in run.view.shards() for tensor in (shard.param, *shard.state.values())]
    return asked, streamed, counts


def test_what_the_pass_streams_lies_in_huge_pages_from_the_first_step_on_and_is_asked_for_once(rank_pool):
    offload = {"stage": 2, "offload": {"optimizer": "cpu"}}
    asked, streamed, (first, second) = rank_pool(2).run(tensors_given_huge_pages, memory=None, deepspeed=offload)[0]
    assert set(streamed) < set(asked), "the gradient beside weights, moments and anchor"
    assert first == second == len(asked)
