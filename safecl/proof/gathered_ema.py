"""An exponential moving average written inside gathered parameters under ZeRO-3 is thrown away.

    e <- beta e + (1 - beta) p,   p = 1, e_0 = 0, beta = 0.5:   e_3 = 1 - 0.5^3 = 0.875

`deepspeed.zero.GatheredParameters(params)` gives every rank a whole copy to read. Without `modifier_rank`, writes to
the copy are dropped when the parameters are partitioned again, and the average keeps its start value. RLHF trainers had
this failure for years (OpenRLHF pull request 1357). safecl keeps the average with each rank's own shard and never
gathers it.
"""

from __future__ import annotations

from typing import Any

import torch

from safecl.proof.finding import Finding

STEPS, BETA = 3, 0.5
RIGHT = 1 - BETA**STEPS


def measure() -> Finding:
    """Compare both averages with the right one. A collective call on any number of ranks."""
    usual, ours = by_gathering(), by_safecl()
    return Finding(
        "gathered-ema", "EMA inside gathered parameters, ZeRO-3", "average of a weight after 3 steps",
        f"{RIGHT:.3f}", f"{usual:.3f}", f"{ours:.3f}", seen=abs(usual - RIGHT) > 1e-3, holds=abs(ours - RIGHT) <= 1e-6,
    )  # fmt: skip


def by_gathering(modifier_rank: int | None = None) -> float:
    """Average in the usual way: model and average are partitioned, and gathered for the update. The remedy is
    `modifier_rank=0`."""
    import deepspeed

    model, average = _partitioned(1.0), _partitioned(0.0)
    for _ in range(STEPS):
        for p, e in zip(model.parameters(), average.parameters(), strict=True):
            with deepspeed.zero.GatheredParameters([p, e], modifier_rank=modifier_rank), torch.no_grad():
                e.data.mul_(BETA).add_(p.data, alpha=1 - BETA)
    with deepspeed.zero.GatheredParameters(list(average.parameters())):
        return average.weight.float().mean().item()


def _partitioned(value: float) -> torch.nn.Linear:
    """Make a layer whose weights are all `value`, sharded over the ranks."""
    import deepspeed

    module = torch.nn.Linear(64, 64, bias=False)
    torch.nn.init.constant_(module.weight, value)
    deepspeed.zero.Init(module=module, config_dict_or_path=_config())
    return module


def by_safecl() -> float:
    """Keep the same average as state of the shard optimizer, with learning rate 0."""
    import deepspeed

    from safecl import ShardAdamW, ShardMap, UpdatePlan

    module = torch.nn.Linear(64, 64, bias=False)
    torch.nn.init.constant_(module.weight, 1.0)
    optimizer = ShardAdamW(module.parameters())
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=_config())
    shards = ShardMap(engine)
    optimizer.bind(shards)
    optimizer.new_state("ema")  # zeros
    for _ in range(STEPS):
        engine.backward(engine(torch.ones(2, 64)).square().mean())
        optimizer.action = optimizer.update(UpdatePlan(lr=0.0, ema_decay=BETA))
        engine.step()
    return shards.read("weight", optimizer.tensors("ema")).mean().item()


def _config() -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "steps_per_print": 10**9,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }  # fmt: skip
