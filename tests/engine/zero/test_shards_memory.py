"""State that is dropped leaves memory in every stage, and the step makes no second copy of a shard's gradients where it
needs none."""

from __future__ import annotations

import gc
import weakref

import pytest

from tests.engine import scenes

METHODS = {"ewc": {"sign_batches": 2, "rows_per_batch": 4}}


def what_stays_alive(bf16: bool, **changes) -> list[str]:
    """Names of the first task's kinds of state whose memory is still there after a step of the second task."""
    from unittest import mock

    import torch

    from safecl.engine.zero.optimizer import ShardAdamW

    dtype = torch.bfloat16 if bf16 else torch.float32
    run, task = scenes.build_run(
        scenes.run_config(model={"dtype": "bf16" if bf16 else "fp32"}, **changes), scenes.tiny_model(dtype=dtype)
    )
    watched = {}

    def watch(self, *arguments):
        for shard in self._shards:
            if "_fisher_sum" in shard.state:
                watched["_fisher_sum"] = weakref.ref(shard.state["_fisher_sum"].untyped_storage())
        return step(self, *arguments)

    step = ShardAdamW.step
    with mock.patch.object(ShardAdamW, "step", watch):
        scenes.begin(run, task)
        run.train_step(task)
        (shard, *_) = run.view.shards()
        watched |= {kind: weakref.ref(shard.state[kind].untyped_storage()) for kind in ("exp_avg", "exp_avg_sq")}
        run.end_task()
        run.begin_task(task, active=True)
        run.train_step(task)
    gc.collect()
    assert len(watched) == 3
    return [kind for kind, storage in watched.items() if storage() is not None]


@pytest.mark.parametrize(
    ("stage", "offload", "bf16"),
    [(0, "none", True), (1, "none", True), (1, "cpu", False), (2, "none", True), (3, "none", True)],
)
def test_sums_of_a_fisher_and_moments_of_a_task_that_has_ended_leave_memory(rank_pool, stage, offload, bf16):
    deepspeed = {"stage": stage, "offload": {"optimizer": offload}}
    for left in rank_pool(2).run(what_stays_alive, bf16=bf16, methods=METHODS, deepspeed=deepspeed):
        assert left == []


def steps_on_the_buffer(**changes) -> list[bool]:
    """Whether the optimizer saw DeepSpeed's buffer of reduced gradients itself, by step."""
    run, task = scenes.make_run(scenes.run_config(**changes))
    update, seen = run.engine.update, []

    def watching(plan):
        action, buffer = update(plan), run.engine.deepspeed.optimizer.grad_partitions_flat_buffer
        return lambda shards: (seen.append(shards[0].grad.data_ptr() == buffer.data_ptr()), action(shards))

    run.engine.update = watching
    for _ in range(2):
        run.train_step(task)
    return seen


def test_stage_3_steps_on_the_reduced_gradients_themselves(rank_pool):
    assert rank_pool(2).run(steps_on_the_buffer, deepspeed={"stage": 3}) == [[True, True]] * 2
