"""Options of the reduction: overlapping changes no number, and bf16 on the wire changes little."""

from __future__ import annotations

import pytest
import torch

from safecl.engine.zero.deepspeed_config import deepspeed_config
from tests.engine import scenes


def trained(**deepspeed) -> torch.Tensor:
    """Weights after three steps in bf16, and the weights before, as one vector each: [2, n]."""
    run, task = scenes.make_run(
        scenes.run_config(model={"dtype": "bf16"}, memory=None, methods={}, deepspeed=deepspeed),
        scenes.tiny_model(dtype=torch.bfloat16),
    )
    before = scenes.state_of(run)["weights"]
    for _ in range(3):
        run.train_step(task)
    after = scenes.state_of(run)["weights"]
    return torch.stack([torch.cat([each[name].view(-1) for name in before]) for each in (before, after)])


@pytest.mark.parametrize("stage", [2, 3])
def test_overlapping_is_bitwise_equal_and_bf16_on_the_wire_is_near(rank_pool, stage):
    plain, overlapped, narrow = (
        rank_pool(2).run(trained, stage=stage, **options)[0]
        for options in ({}, {"overlap_comm": True}, {"reduce_dtype": "bf16"})
    )
    assert torch.equal(plain, overlapped)
    moved, difference = (plain[1] - plain[0]).norm(), (narrow[1] - plain[1]).norm()
    assert 0 < difference <= 0.05 * moved


def test_they_reach_deepspeed_by_its_names():
    config = scenes.run_config(model={"dtype": "bf16"}, deepspeed={"overlap_comm": True, "reduce_dtype": "bf16"})
    found = deepspeed_config(config)
    assert found["zero_optimization"]["overlap_comm"] is True and found["communication_data_type"] == "bf16"
    found = deepspeed_config(scenes.run_config(model={"dtype": "bf16"}))
    assert found["zero_optimization"]["overlap_comm"] is False and found["communication_data_type"] == "fp32"
