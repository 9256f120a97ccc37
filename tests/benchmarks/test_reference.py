"""The update that `reference.py --only offload` times: it runs without DeepSpeed, and the place of its state changes no
weight."""

from __future__ import annotations

import json

import torch

from benchmarks import ROOT
from benchmarks.engine.reference import LIMITS, optimizer_of, predicted_share


def test_state_in_host_memory_adds_less_than_its_limits_by_the_model():
    measured = json.loads((ROOT / "benchmarks" / "results" / "reference-cuda.json").read_text())["offload"]
    predicted = {tokens: predicted_share(measured["matmul_flops_per_s"], tokens) for tokens in LIMITS}
    assert all(predicted[tokens] <= limit for tokens, limit in LIMITS.items())
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert all(f"{100 * share:.2g} %" in page for share in predicted.values()), predicted


def test_the_timed_update_steps_with_state_in_both_places():
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
