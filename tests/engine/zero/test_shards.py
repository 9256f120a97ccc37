"""The map between flat shards and parameters, reading, writing, and the EMA in place of the live weights."""

from __future__ import annotations

import pytest
import torch

from tests.engine import scenes

STAGES = [(0, "none"), (1, "none"), (2, "none"), (2, "cpu"), (3, "none"), (3, "cpu")]
EMA = {"ema": {"decay": 0.9}}


def _deepspeed(stage: int, offload: str) -> dict:
    return {"stage": stage, "offload": {"optimizer": offload, "parameters": offload if stage == 3 else "none"}}


def fragments_and_values(**changes):
    run, _ = scenes.make_run(scenes.run_config(**changes))
    shards = run.engine.shards
    pieces = [(f.name, f.offset, f.length, shards.view(f).clone()) for f in shards.fragments]
    return pieces, shards.shapes, shards.replicated


@pytest.mark.parametrize(("stage", "offload"), STAGES)
def test_fragments_of_all_ranks_are_a_partition_of_the_weights(rank_pool, stage, offload):
    model = dict(scenes.tiny_model().named_parameters())
    ranks = rank_pool(2).run(fragments_and_values, memory=None, deepspeed=_deepspeed(stage, offload))
    parts = ranks[:1] if ranks[0][2] else ranks
    seen = {name: torch.zeros(p.numel(), dtype=torch.int) for name, p in model.items()}
    for pieces, shapes, _ in parts:
        assert shapes == {name: tuple(p.shape) for name, p in model.items()}
        for name, offset, length, values in pieces:
            seen[name][offset : offset + length] += 1
            assert torch.equal(values, model[name].detach().flatten()[offset : offset + length])
    assert all((count == 1).all() for count in seen.values())


def write_and_forward(**changes):
    run, _ = scenes.make_run(scenes.run_config(**changes))
    engine, shards = run.engine, run.engine.shards
    ids, positions = torch.arange(3, 11)[None], torch.arange(8)[None]
    before = engine.logits(ids, None, positions).clone()
    other = dict(scenes.tiny_model().named_parameters())
    for index, name in enumerate(shards.shapes):
        shards.write(name, other[name].detach() * (1.0 + 0.01 * (index + 1)))
    shards.publish()
    after = engine.logits(ids, None, positions).clone()
    back = {name: shards.read(name) for name in shards.shapes}
    return before, after, back


@pytest.mark.parametrize(("stage", "offload"), STAGES)
def test_what_is_written_is_read_back_and_reaches_the_forward_pass(rank_pool, stage, offload):
    plain = scenes.tiny_model().eval()
    for index, (_, p) in enumerate(plain.named_parameters()):
        p.data *= 1.0 + 0.01 * (index + 1)
    expected = plain(input_ids=torch.arange(3, 11)[None], position_ids=torch.arange(8)[None], use_cache=False).logits
    for before, after, back in rank_pool(2).run(write_and_forward, memory=None, deepspeed=_deepspeed(stage, offload)):
        assert (after - before).norm() > 1e-3 * before.norm()
        assert (after - expected).norm() <= 1e-5 * expected.norm()
        assert all(torch.equal(back[name], p.detach()) for name, p in plain.named_parameters())


def swap_the_average(**changes):
    from safecl.engine.passes.live_model import evaluating

    run, task = scenes.make_run(scenes.run_config(**changes))
    for _ in range(3):
        run.train_step(task)
    ids, positions = torch.arange(3, 11)[None], torch.arange(8)[None]
    live, state = run.engine.logits(ids, None, positions).clone(), scenes.state_of(run)
    with evaluating(run.engine, average=True) as model:
        averaged, _ = model.logits(ids, None, positions)
        averaged = averaged.clone()
    again, restored = run.engine.logits(ids, None, positions), scenes.state_of(run)
    return live, averaged, again, state, restored


@pytest.mark.parametrize(("stage", "offload"), STAGES)
def test_the_average_takes_the_weights_place_and_everything_is_as_before_afterwards(rank_pool, stage, offload):
    for live, averaged, again, state, restored in rank_pool(2).run(
        swap_the_average, methods=EMA, deepspeed=_deepspeed(stage, offload)
    ):
        plain = scenes.tiny_model().eval()
        plain.load_state_dict(state["ema"], strict=False)
        expected = plain(
            input_ids=torch.arange(3, 11)[None], position_ids=torch.arange(8)[None], use_cache=False
        ).logits
        assert (averaged - expected).norm() <= 1e-5 * expected.norm()
        assert (averaged - live).norm() > 1e-3 * live.norm()
        assert torch.equal(live, again)
        assert all(
            torch.equal(state[kind][name], restored[kind][name]) for kind in ("weights", "ema") for name in state[kind]
        )


def weights_after_start(**changes):
    run, _ = scenes.make_run(scenes.run_config(**changes), scenes.tiny_model(dtype=torch.bfloat16))
    return scenes.state_of(run)["weights"], run.engine.optimizer.num_updates


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_initialisation_moves_no_weight_in_bf16(rank_pool, stage):
    """DeepSpeed's stage 0 steps once inside initialize; with weight decay that would move the masters."""
    model = {"path": "unused", "dtype": "bf16", "gradient_checkpointing": False}
    weights, updates = rank_pool(1).run(
        weights_after_start, memory=None, model=model, train={"weight_decay": 0.5}, deepspeed={"stage": stage}
    )[0]
    start = dict(scenes.tiny_model(dtype=torch.bfloat16).named_parameters())
    assert updates == 0
    assert all(torch.equal(weights[name], p.detach().float()) for name, p in start.items())


def test_another_deepspeed_is_refused_by_name(monkeypatch):
    import deepspeed

    from safecl.engine.zero.shards import check_deepspeed_version

    monkeypatch.setattr(deepspeed, "__version__", "0.21.0")
    with pytest.raises(RuntimeError, match=r"DeepSpeed 0\.21\.0 is not supported"):
        check_deepspeed_version()
