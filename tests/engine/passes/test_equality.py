"""The engine trains the same numbers as plain single-process PyTorch, in every ZeRO stage."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.engine import scenes
from tests.engine.passes import oracle, step_scenes

STEPS, SEED = 10, 3
METHODS = {
    "ewc": {"strength": 0.5, "sign_batches": 8, "rows_per_batch": 4},
    "ema": {"decay": 0.9},
    "er": {"weight": 0.5},
}
LIMIT = 1e-3

PLACES = [
    (0, "none", "none"),
    (1, "none", "none"),
    (1, "cpu", "none"),
    (2, "none", "none"),
    (2, "cpu", "none"),
    (3, "none", "none"),
    (3, "cpu", "none"),
    (3, "none", "cpu"),
    (3, "cpu", "cpu"),
]


def memory_of(rows, world_size: int = 1):
    from safecl.replay import MemoryRow, ReplayBuffer

    buffer = ReplayBuffer(scenes.run_config().memory, seed=SEED, rank=0, world_size=world_size)
    buffer.insert(MemoryRow(rows.row(i)) for i in range(len(rows)))
    return buffer


def rows_of_steps(steps: int = STEPS):
    """(task rows, replay rows) of each step, straight from the order and the buffer."""
    from safecl.data import TaskOrder

    data, buffer = scenes.random_dataset(60, seed=1), memory_of(scenes.random_dataset(20, seed=2))
    order = TaskOrder(data, seed=SEED, tokens_per_batch=160, max_steps=steps)
    return [
        (data.rows(order.rows_of_step(s)), [buffer.get(key).row for key in buffer.draw(s, 40, "replay")])
        for s in range(steps)
    ]


@functools.cache
def expected(tied: bool = False, weight_decay: float = 0.0):
    """Start, end and Fisher of the plain PyTorch loop."""
    model = scenes.tiny_model(tied)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffer = memory_of(scenes.random_dataset(20, seed=2))
    keys = buffer.keys()
    fisher = oracle.fisher(model, [buffer.get(key).row for key in keys], keys, SEED, sign_batches=8, rows_per_batch=4)
    hyper = oracle.Hyper(strength=0.5, replay_weight=0.5, weight_decay=weight_decay)
    return start, oracle.train(model, rows_of_steps(), hyper, fisher) | {"fisher": fisher}


def errors_of(found, tied: bool = False, weight_decay: float = 0.0) -> dict[str, float]:
    """||a - b|| / ||b - b_start|| for the states that move, ||a - b|| / ||b|| for anchor and Fisher."""
    start, end = expected(tied, weight_decay)
    moving = {kind: oracle.relative_distance(found[kind], end[kind], start) for kind in ("weights", "ema")}
    return moving | {kind: oracle.relative_distance(found[kind], end[kind]) for kind in ("anchor", "fisher")}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("stage", "optimizer", "parameters"), PLACES)
def test_weights_ema_anchor_and_fisher_equal_plain_pytorch(rank_pool, world_size, stage, optimizer, parameters):
    deepspeed = {"stage": stage, "offload": {"optimizer": optimizer, "parameters": parameters}}
    for found in rank_pool(world_size).run(scenes.train_to_state, steps=STEPS, methods=METHODS, deepspeed=deepspeed):
        assert max(errors_of(found).values()) <= LIMIT, errors_of(found)


@pytest.mark.parametrize("stage", [2, 3])
def test_tied_embeddings_and_weight_decay_equal_plain_pytorch(rank_pool, stage):
    train = {"weight_decay": 0.1}
    found = rank_pool(2).run(
        scenes.train_to_state, steps=STEPS, tied=True, methods=METHODS, deepspeed={"stage": stage}, train=train
    )[0]
    assert max(errors_of(found, tied=True, weight_decay=0.1).values()) <= LIMIT


def test_padded_batches_equal_packed_ones(rank_pool):
    found = rank_pool(2).run(scenes.train_to_state, steps=STEPS, methods=METHODS, train={"packing": "padded"})[0]
    assert max(errors_of(found).values()) <= LIMIT


def test_the_setting_has_what_makes_it_hard(rank_pool):
    """Accumulation, unequal lengths, clipping at work, and a rank without replay tokens in some step."""
    shapes = rank_pool(2).run(step_scenes.shape_of_steps, steps=STEPS, methods=METHODS)
    assert max(shape["micro_batches"] for shape in shapes[0]) >= 2
    assert any(0 in (a["replay_targets"], b["replay_targets"]) for a, b in zip(*shapes, strict=True))
    assert all(shape["grad_norm"] > 1.0 for shape in shapes[0][:3])


MUTATIONS = ["ema_no_op", "penalty_sign", "fisher_doubled", "clip_off", "normaliser_per_micro_batch"]


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_step_does_not_pass(rank_pool, mutation):
    """The proof above bites: each of these mistakes exceeds its limit."""
    found = rank_pool(2).run(
        step_scenes.train_broken, mutation=mutation, steps=STEPS, methods=METHODS, deepspeed={"stage": 2}
    )[0]
    assert max(errors_of(found).values()) > 3 * LIMIT, errors_of(found)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_on_one_rank_is_bitwise_equal_to_a_loop_with_the_same_head(rank_pool, stage):
    model = {"path": "unused", "dtype": "bf16", "gradient_checkpointing": False}
    train = {
        "tokens_per_microbatch": 4096,
        "packing": "packed",
        "clip_norm": 0.0,
    }  # every stage sums the norm in its own order
    changes = dict(methods={"ema": {"decay": 0.9}}, model=model, train=train, deepspeed={"stage": stage})
    found = rank_pool(1).run(scenes.train_to_state, steps=STEPS, bf16=True, memory=None, **changes)[0]
    reference = rank_pool(1).run(step_scenes.bf16_reference, steps=STEPS, ema_decay=0.9)[0]
    for kind in ("weights", "ema"):
        for name, value in reference[kind].items():
            assert torch.equal(found[kind][name], value), (kind, name)


def test_ewc_of_strength_zero_is_bitwise_plain_fine_tuning(rank_pool):
    plain = rank_pool(2).run(scenes.train_to_state, steps=5, methods={})[0]
    zero = rank_pool(2).run(scenes.train_to_state, steps=5, methods={"ewc": {"strength": 0.0}})[0]
    assert all(torch.equal(plain["weights"][name], zero["weights"][name]) for name in plain["weights"])


@pytest.mark.parametrize("stage", [2, 3])
def test_der_of_weight_zero_is_plain_fine_tuning_and_of_weight_a_tenth_is_not(rank_pool, stage):
    deepspeed = {"stage": stage}
    start = {name: p.detach().clone() for name, p in scenes.tiny_model().named_parameters()}
    runs = [{}, {"der": {"alpha": 0.0}}, {"der": {"alpha": 0.1}}]
    plain, zero, tenth = (
        rank_pool(2).run(scenes.train_to_state, steps=5, methods=m, deepspeed=deepspeed)[0]["weights"] for m in runs
    )
    assert oracle.relative_distance(zero, plain, start) <= 1e-6
    assert oracle.relative_distance(tenth, plain, start) > 1e-3


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_gradients_are_accumulated_and_reduced_in_fp32(rank_pool, stage):
    """bf16 sums over these micro-batches and ranks would be wrong by more than 1e-3."""
    model = {"path": "unused", "dtype": "bf16", "gradient_checkpointing": False}
    train = {"tokens_per_microbatch": 24, "max_length": 24}
    changes = dict(memory=None, model=model, train=train, deepspeed={"stage": stage})
    found = rank_pool(2).run(step_scenes.bf16_gradient, **changes)[0]
    expected = step_scenes.summed_bf16_gradients()
    assert oracle.relative_distance(found, expected) <= 5e-4
