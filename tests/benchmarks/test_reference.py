"""The update that `reference.py --only offload` times: it runs without DeepSpeed, and the place of its state changes no
weight."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_timed_update_steps_with_state_in_both_places(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "reference", raising=False)
    from reference import optimizer_of

    weights = []
    for place in ("none", "cpu"):
        optimizer, run = optimizer_of(torch.device("cpu"), 1000, place)
        (shard,) = optimizer.shards()
        before = shard.param.detach().clone()
        run()
        run()
        assert not torch.equal(shard.param, before)
        weights.append(shard.param.detach().clone())
    assert torch.equal(*weights)
