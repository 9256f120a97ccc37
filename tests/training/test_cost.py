"""The bytes that a run reports for its methods."""

from __future__ import annotations

import pytest

from safecl.training.output.cost import kept_bytes, state_bytes
from tests.engine.scenes import make_run, run_config

METHODS = {"ema": {"decay": 0.5}, "agem": {}}


def sizes(stage: int) -> tuple[dict[str, int], dict[str, int], int]:
    """The state of a run after a step, what of it the methods keep, and the number of weights."""
    run, task = make_run(run_config(methods=METHODS, deepspeed={"stage": stage}))
    run.train_step(task)
    state = state_bytes(run)
    kept = kept_bytes(run, state)
    run.close()
    return state, kept["state"], sum(p.numel() for p in run.engine.module.parameters()) if stage < 3 else 0


@pytest.mark.parametrize("stage", [0, 2])
def test_state_is_counted_once_in_every_stage(rank_pool, stage):
    """On two ranks: stage 0 keeps a copy on each rank, and one is counted; stage 2 pads the shards a little."""
    state, kept, num_weights = rank_pool(2).run(sizes, stage=stage)[0]
    assert set(kept) == {"ema", "agem_grad"} and {"exp_avg", "exp_avg_sq"} <= set(state)
    for size in [state["exp_avg"], *kept.values()]:
        assert 4 * num_weights <= size <= 4 * num_weights + 64
