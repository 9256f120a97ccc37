"""Penalty and average need no communication: their steps make the collective calls of plain fine-tuning, of the same
shapes. And errors of one rank reach all ranks.

Counted among the profiler's c10d events, because DeepSpeed binds its collectives early and a wrapper around
torch.distributed misses most.
"""

from __future__ import annotations

from collections import Counter

import pytest

from safecl.config import ConfigError
from tests.engine import scenes

EWC_AND_EMA = {"ewc": {"strength": 0.5, "sign_batches": 2, "rows_per_batch": 4}, "ema": {"decay": 0.9}}


def collectives_of_steps(path: str, steps: int = 2, extra: bool = False, **changes) -> Counter:
    """(collective, shapes of its tensors) of some training steps and their logging, after a first one; `extra` adds one
    all-reduce."""
    import torch
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile

    from safecl.engine.reference.loading import load_model

    config = scenes.run_config(model={"path": path, "dtype": "bf16", "gradient_checkpointing": False}, **changes)
    loaded, store = load_model(config.model)
    run, task = scenes.build_run(config, loaded, store)
    scenes.begin(run, task)
    run.train_step(task).totals()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        for _ in range(steps):
            run.train_step(task).totals()
        if extra:
            dist.all_reduce(torch.zeros(1))
    events = [event for event in seen.events() if event.name.startswith("c10d::")]
    return Counter((event.name, str(event.input_shapes)) for event in events)


@pytest.mark.parametrize("stage", [2, 3])
def test_ewc_and_ema_add_no_collective_to_plain_fine_tuning(rank_pool, tmp_path, stage):
    scenes.tiny_model().save_pretrained(tmp_path)

    def counted(**changes) -> list[Counter]:
        return rank_pool(2).run(collectives_of_steps, path=str(tmp_path), deepspeed={"stage": stage}, **changes)

    plain, with_methods, with_one_more = (
        counted(),
        counted(methods=EWC_AND_EMA),
        counted(methods=EWC_AND_EMA, extra=True),
    )
    assert plain == with_methods
    for before, after in zip(plain, with_one_more, strict=True):
        assert (after - before).total() == 1 and (before - after).total() == 0
        assert before.total() > 10, before


# ------------------------------------------------------------------------------------- errors that all ranks must raise


def work_with_an_error_on(rank: int, alone: bool) -> tuple[object, list[int]]:
    """(value or error of a collective piece of work that fails on one rank, ranks that have done it)."""
    from safecl.distributed import collectives

    done = []

    def work() -> str:
        done.append(collectives.rank())
        if collectives.rank() == rank:
            raise OSError(f"the disk of rank {rank}")
        return f"value of rank {collectives.rank()}"

    call = collectives.on_first_rank if alone else collectives.on_every_rank
    try:
        return call(work, (OSError,), lambda problem: ConfigError(f"told: {problem}")), done
    except ConfigError as error:
        return str(error), done


@pytest.mark.parametrize("ranks", [1, 2])
def test_work_of_the_first_rank_gives_every_rank_its_value_or_its_error(rank_pool, ranks):
    pool = rank_pool(ranks)
    fine, failed = (pool.run(work_with_an_error_on, rank=rank, alone=True) for rank in (5, 0))
    assert fine == [("value of rank 0", [0]), ("value of rank 0", [])][:ranks]
    assert failed == [("told: the disk of rank 0", [0]), ("told: the disk of rank 0", [])][:ranks]


@pytest.mark.parametrize("broken", [0, 1])
def test_work_of_every_rank_gives_each_its_own_value_or_all_the_first_error(rank_pool, broken):
    pool = rank_pool(2)
    fine, failed = (pool.run(work_with_an_error_on, rank=rank, alone=False) for rank in (5, broken))
    assert fine == [("value of rank 0", [0]), ("value of rank 1", [1])]
    assert failed == [(f"told: the disk of rank {broken}", [rank]) for rank in range(2)]


def limits_of_new_groups(folder: str) -> tuple[float, float, float]:
    """Seconds after which a call fails: of a group that deepspeed.initialize makes, of one that is made under a
    watchdog, at once and when the next phase begins."""
    from datetime import timedelta
    from pathlib import Path
    from unittest import mock

    import deepspeed
    import torch
    import torch.distributed as dist

    from safecl.distributed import progress, watchdog
    from safecl.engine.zero.shards import initialize

    made = []

    def limit() -> float:
        seconds: timedelta = made[-1]._get_backend(torch.device("cpu")).options._timeout
        return seconds.total_seconds()

    def make(**arguments):
        made.append(deepspeed.comm.new_group([0, 1]))
        return (made[-1],)

    with watchdog.watching(Path(folder), 100.0) as dog, mock.patch.object(deepspeed, "initialize", make):
        dog.attach()
        with progress.phase(progress.STEP):
            initialize(torch.nn.Linear(1, 1), None, {"zero_optimization": {"stage": 2}})
            found = [limit()]
            make()
            found.append(limit())
        with progress.phase("load"):
            found.append(limit())
        dog.close(together=True)
    for group in made:
        dist.destroy_process_group(group)
    return found


def test_groups_that_deepspeed_makes_follow_the_limits_of_the_watchdog(rank_pool, tmp_path):
    for found in rank_pool(2).run(limits_of_new_groups, folder=str(tmp_path)):
        assert found == [130.0, 1800.0, 1830.0]  # 1,800 s is torch's own


def test_the_users_own_limit_of_deepspeed_applies_to_every_phase(monkeypatch):
    from safecl.distributed import collectives

    assert collectives.timeout_of_collectives(61.0) == 70.0
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "2")
    assert collectives.timeout_of_collectives(61.0) == collectives.timeout_of_phase() == 120.0
