"""The threshold of a share of all weights: exact, in the memory of a chunk."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from safecl.engine.fisher.threshold import upper_threshold
from safecl.planning.costs.activations import LiveBytes


def engine_with(values: torch.Tensor) -> SimpleNamespace:
    shards = SimpleNamespace(numel=values.numel(), reduce_sum=lambda counts: counts)
    return SimpleNamespace(shards=shards, optimizer=SimpleNamespace(tensors=lambda kind: [values]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_value_that_at_most_the_share_exceeds(dtype):
    values = torch.randn(50_001, generator=torch.Generator().manual_seed(0)).square().to(dtype)
    threshold = upper_threshold(engine_with(values), "fisher", 0.1, chunk=1000)
    assert (values > threshold).sum() <= 5000 < (values >= threshold).sum()


def test_a_large_shard_takes_the_memory_of_a_few_chunks():
    """A list of the whole shard as int64 took twice the shard's own bytes."""
    values, chunk = torch.rand(1 << 22), 1 << 16
    with LiveBytes(known=[values]) as live:
        upper_threshold(engine_with(values), "fisher", 0.1, chunk=chunk)
    assert live.peak < 24 * chunk + 8 * 8 * (1 << 16) < values.nbytes
