"""An average in host memory follows the weights while the next pass computes, with the numbers of one that is taken
inside the step."""

from __future__ import annotations

import pytest
import torch

from safecl.engine.zero import pieces, update
from safecl.engine.zero.optimizer import ShardAdamW
from safecl.engine.zero.pieces import Hosted
from safecl.engine.zero.placement import StatePlacement
from safecl.engine.zero.shard import Shard
from safecl.engine.zero.shards import Fragment
from safecl.engine.zero.update import UpdatePlan, place_of_average
from safecl.methods.terms import AverageMask, Penalty
from tests.engine import scenes
from tests.engine.zero.simulated_streams import Machine

STEPS = 4


class Shards:
    """A shard map without DeepSpeed, with a shard for each parameter."""

    replicated = True

    def __init__(self, sizes: tuple[int, ...]):
        self.flats, self.numel = [value.clone() for value in values("weights", sizes)], sum(sizes)
        self.fragments = [Fragment(f"p{i}", 0, size, i, 0) for i, size in enumerate(sizes)]
        self.shapes = {f"p{i}": (size,) for i, size in enumerate(sizes)}

    def grad_norm(self):
        return torch.ones(())

    def reduce_sum(self, value):
        return value

    def all_agree(self, flag):
        return flag


def values(name: str, sizes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return [torch.rand(size, generator=generator) for size in sizes]


def optimizer_with(sizes: tuple[int, ...], away: str = "") -> ShardAdamW:
    shard_map = Shards(sizes)
    optimizer = ShardAdamW(shard_map.flats)
    optimizer.placement = StatePlacement("none", *("cpu" if kind in away else "none" for kind in ("fisher", "ema")))
    optimizer.bind(shard_map)
    optimizer.copy_weights_to("anchor")
    optimizer.copy_weights_to("ema")
    for shard, fisher in zip(optimizer.shards(), values("fisher", sizes), strict=True):
        shard.keep("fisher", fisher)
        shard.param.grad = torch.zeros_like(shard.param)
    return optimizer


def train(optimizer: ShardAdamW, machine: Machine | None = None) -> list[torch.Tensor]:
    """Return the weights that each step's forward pass has seen, of all shards."""
    flats = optimizer._shard_map.flats
    sizes = tuple(flat.numel() for flat in flats)
    seen = [torch.full((size,), float("nan")) for _ in range(STEPS) for size in sizes]
    copy = torch.Tensor.copy_ if machine is None else machine.later(torch.Tensor.copy_)
    for step in range(STEPS):
        here = seen[step * len(sizes) : (step + 1) * len(sizes)]
        for flat, grad, sight in zip(flats, values(f"grad {step}", sizes), here, strict=True):
            copy(sight, flat)
            copy(flat.grad, grad - 0.5)
        plan = UpdatePlan(lr=0.1, penalties=[Penalty(0.3, fisher="fisher")], ema_decay=0.7)
        optimizer.action = optimizer.update(plan)
        optimizer.step()
    return seen


def state_of(optimizer: ShardAdamW) -> list[torch.Tensor]:
    """What is read after training, at once: `tensors` waits for the average."""
    return [tensor.clone() for tensor in (*optimizer.tensors("ema"), *optimizer._shard_map.flats)]


@pytest.mark.parametrize("away", ["ema", "fisher and ema"])
@pytest.mark.parametrize(("sizes", "chunk"), [((50,), 1000), ((50,), 20), ((50, 7, 23), 1000), ((50, 7, 23), 5)])
def test_in_every_order_of_the_streams_the_numbers_are_those_of_an_average_inside_the_step(
    monkeypatch, sizes, chunk, away
):
    inside = optimizer_with(sizes)
    expected, expected_state = train(inside), state_of(inside)
    for seed in range(30):
        machine = Machine(seed)
        with monkeypatch.context() as patched:
            machine.install(patched)
            patched.setattr(Shard, "is_streamed", lambda shard, kind: shard.placement.of(kind) == "cpu")
            lanes = pieces._Lanes
            patched.setattr(pieces, "_Lanes", lambda device, lanes=lanes: lanes(torch.device("cuda")))
            optimizer = optimizer_with(sizes, away)
            optimizer._stream.chunk = chunk
            for name in ("copy_to", "copy_from"):
                patched.setattr(Hosted, name, machine.later(getattr(Hosted, name)))
            patched.setattr(update, "adamw_step_", machine.later(update.adamw_step_, torch.zeros(())))
            patched.setattr(update, "ema_update_", machine.later(update.ema_update_))
            seen = train(optimizer, machine)
            state = state_of(optimizer)
            machine.finish()
        assert all(map(torch.equal, state, expected_state)), seed
        assert all(map(torch.equal, seen, expected)), seed


class Near:
    def is_streamed(self, kind):
        return False


class Far:
    def is_streamed(self, kind):
        assert kind == "ema"
        return True


@pytest.mark.parametrize(
    ("changes", "near", "far"),
    [
        ({"ema_decay": None}, None, None),
        ({}, "pass", "aside"),
        ({"step_transforms": [print]}, "after", "aside"),
        ({"after_update": [print]}, "pass", "pass"),  # it may change the weights
        ({"after_update": [print], "step_transforms": [print]}, "after", "after"),
        ({"ema_mask": AverageMask("fisher", 0.5, 0.9)}, "pass", "pass"),
    ],
)
def test_an_average_waits_for_the_next_pass_where_it_is_in_host_memory_and_nothing_else_acts(changes, near, far):
    plan = UpdatePlan(**{"lr": 0.1, "ema_decay": 0.9, **changes})
    assert (place_of_average(plan, [Near()]), place_of_average(plan, [Far()])) == (near, far)


def works_by_step(steps: int = 4, **changes):
    """The number of works on the new weights in the plan of each step."""
    run, task = scenes.make_run(scenes.run_config(memory=None, **changes))
    counts = []
    for _ in range(steps):
        counts.append(len(run.update_plan().after_update))
        run.train_step(task)
    return counts


@pytest.mark.parametrize(
    ("settings", "counts"),
    [({"decay": 0.9}, [0, 0, 0, 0]), ({"decay": 0.5, "write_back": "slow", "every": 2}, [0, 1, 0, 1])],
)
def test_an_average_works_on_the_new_weights_in_the_steps_that_write_it_back(rank_pool, settings, counts):
    assert rank_pool(2).run(works_by_step, methods={"ema": settings})[0] == counts
