"""On a GPU: state in host memory, in chunks through two buffers, gives bitwise the steps of state beside the shard."""

from __future__ import annotations

import pytest
import torch

from benchmarks.engine.reference import optimizer_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("numel", [1_000_003, 40_000_000])
def test_offloaded_state_gives_the_steps_of_state_beside_the_shard(numel):
    seen, a = [], torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    for place in ("none", "cpu"):
        optimizer, update = optimizer_of(torch.device("cuda"), numel, place)
        (shard,) = optimizer.shards()
        shard.stream.chunk = 3_000_001
        for _ in range(4):
            update()
            for _ in range(20):
                a @ a  # passes, beside which the average is taken
        (shard,) = optimizer.shards()  # waits for what is still on its way out
        assert shard.state["ema"].is_cuda == (place == "none")
        seen.append((shard.param.clone(), shard.state["ema"].cuda()))
        del optimizer, update, shard
    assert all(torch.equal(near, away) for near, away in zip(*seen, strict=True))


def test_the_reference_store_is_registered_with_cuda(tmp_path):
    from safecl import ReferenceStore
    from tests.engine.scenes import tiny_model

    tiny_model().save_pretrained(tmp_path)
    with ReferenceStore.open(tmp_path, dtype=torch.bfloat16) as store:
        assert store.pinned and store.notes == []
        for name in store.names():
            out = torch.empty(store.shape(name), dtype=torch.bfloat16, device="cuda")
            store.read(name, 0, out.numel(), out)
            torch.cuda.synchronize()
            assert torch.equal(out.cpu(), store.tensor(name))
