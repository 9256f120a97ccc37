"""A setting that does not fit is named with the nearest one that does."""

from __future__ import annotations

import pytest
import torch

from safecl.planning.costs import memory_report
from safecl.planning.costs.device_memory import plan_memory
from safecl.planning.costs.model_shape import ModelShape
from safecl.planning.costs.nearest import nearest_that_fits
from safecl.storage.sizes import format_bytes
from tests.engine import scenes


def config(**train):
    return scenes.run_config(train={"tokens_per_microbatch": 256, **train}, deepspeed={"stage": 2})


def test_the_cheapest_changes_come_first_and_add_up():
    assert nearest_that_fits(config(), lambda c: c.checkpoint.staging != "2GiB") == "checkpoint.staging=256MiB"
    found = nearest_that_fits(config(), lambda c: c.deepspeed.offload.fisher == "cpu")
    assert found == "checkpoint.staging=256MiB deepspeed.offload.ema=cpu deepspeed.offload.fisher=cpu"


def test_micro_batches_shrink_last_and_never_below_the_longest_row():
    found = nearest_that_fits(config(), lambda c: c.train.tokens_per_microbatch < 128)
    assert found is not None and found.endswith("deepspeed.offload.parameters=cpu train.tokens_per_microbatch=64")
    assert nearest_that_fits(config(), lambda c: c.train.tokens_per_microbatch < 64) is None


def test_check_names_the_nearest_setting_that_fits_this_machine(monkeypatch):
    """1 B weights on one CPU rank: a smaller staging leaves 1.8 GiB more."""
    shape = ModelShape(10**9, 10**9, 10**8, 10**8, hidden=1000, vocab=1000, activations=10**9)
    needed = plan_memory(shape, config(), 1, 1, device="cpu").shared_host
    monkeypatch.setattr(memory_report, "available_memory", lambda: needed)
    assert "  would fit" not in dict(memory_report.memory_lines(lambda ranks: shape, config()))
    monkeypatch.setattr(memory_report, "available_memory", lambda: needed - 10**9)
    assert dict(memory_report.memory_lines(lambda ranks: shape, config()))["  would fit"] == "checkpoint.staging=256MiB"
    monkeypatch.setattr(memory_report, "available_memory", lambda: 10**6)
    lines = dict(memory_report.memory_lines(lambda ranks: shape, config()))
    assert "  too little" in lines and "  would fit" not in lines


@pytest.mark.parametrize(("launched", "ranks", "local"), [(None, 8, 8), ("1", 1, 1), ("4", 4, 4), ("16", 16, 8)])
def test_a_run_without_a_launcher_is_planned_for_its_one_gpu_and_check_for_all(monkeypatch, launched, ranks, local):
    """A machine with eight GPUs; a run sets WORLD_SIZE before it plans."""
    monkeypatch.setattr(memory_report.devices, "on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if launched is not None:
        monkeypatch.setenv("WORLD_SIZE", launched)
    assert (memory_report.ranks_here(), memory_report.local_ranks_here()) == (ranks, local)


def test_a_run_that_does_not_fit_is_refused_with_the_nearest_setting_that_does(monkeypatch):
    shape = ModelShape(10**9, 10**9, 10**8, 10**8, hidden=1000, vocab=1000, activations=10**9)
    needed = plan_memory(shape, config(), 1, 1, device="cpu").shared_host
    monkeypatch.setattr(memory_report, "available_memory", lambda: needed)
    assert memory_report.too_little(lambda ranks: shape, config()) is None
    monkeypatch.setattr(memory_report, "available_memory", lambda: needed - 10**9)
    told = memory_report.too_little(lambda ranks: shape, config())
    assert told == (
        f"the run does not fit here: {format_bytes(needed)} of host memory are needed and "
        f"{format_bytes(needed - 10**9)} are available; checkpoint.staging=256MiB would fit; "
        "train.allow_little_memory: true tries it all the same"
    )
    monkeypatch.setattr(memory_report, "resident_bytes", lambda: 10**9)
    assert memory_report.too_little(lambda ranks: shape, config(), program=10**9) == told  # it is held already
