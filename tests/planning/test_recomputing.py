"""Where a run leaves half of a machine's memory free, activations are not recomputed (`gradient_checkpointing: auto`),
and freed memory is kept. The numbers do not depend on either."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import pytest

from safecl.config import RunConfig, load_config
from safecl.planning.costs import memory_report
from safecl.planning.run_plan import plan_run
from safecl.training import opening
from tests.training.test_trainer import fit, tree


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    from safecl.demo.materials import write_materials

    folder = tmp_path_factory.mktemp("demo")
    write_materials(folder)
    return folder


def config(materials: Path, output: Path, value: bool | str, **changes) -> dict:
    model = {"path": str(materials / "random-model"), "dtype": "fp32", "gradient_checkpointing": value}
    train = {"max_steps": 3, "tokens_per_batch": 300, "tokens_per_microbatch": 512, "max_length": 96}
    train |= {"allow_few_steps": True}
    own = tree(materials, output, methods={"ewc": {"sign_batches": 2, "rows_per_batch": 4}}, train=train) | changes
    return own | {"model": model, "safety": None}


def test_activations_are_counted_only_where_a_bound_does_not_settle_it(materials, tmp_path, monkeypatch):
    plan = plan_run(RunConfig.model_validate(config(materials, tmp_path, "auto")))
    count = mock.Mock(side_effect=memory_report.shapes_of)
    monkeypatch.setattr(memory_report, "shapes_of", count)

    def leaves_half(free: int) -> bool:
        monkeypatch.setattr(memory_report, "available_memory", lambda: free)
        return memory_report.leaves_half(plan)

    assert not leaves_half(2**20) and leaves_half(10**12) and not count.called
    monkeypatch.setattr(memory_report, "ACTIVATION_BYTES", 10**9)  # a bound that settles nothing
    assert leaves_half(10**12) and count.called


def settled(tree: dict, cache: str, spare: tuple[bool, bool], gpu: bool) -> tuple[bool | str, bool]:
    """Settle both on ranks that stand for a machine each. Return what is recomputed, and what is kept."""
    import os

    from safecl.distributed import collectives

    os.environ["SAFECL_CACHE"] = cache
    collectives.init_distributed()
    plan = plan_run(RunConfig.model_validate(tree))
    own = mock.patch.object(memory_report.environment, "local_rank", lambda: 0)
    found = mock.patch.object(memory_report, "leaves_half", lambda plan: spare[collectives.rank()])
    with own, found, mock.patch.object(memory_report.devices, "on_gpu", lambda: gpu):
        return memory_report.settle_memory(plan).model.gradient_checkpointing, plan.keeps_freed_memory


@pytest.mark.parametrize(
    ("value", "spare", "gpu", "recomputes", "keeps"),
    [
        ("auto", (True, False), False, True, False),
        ("auto", (True, True), False, False, True),
        ("auto", (True, True), True, False, False),
        (False, (True, False), False, False, False),
        (True, (True, True), False, True, True),
        (False, (True, True), True, False, False),
    ],
)
def test_all_ranks_do_what_the_fullest_machine_needs(
    rank_pool, materials, tmp_path, value, spare, gpu, recomputes, keeps
):
    asked = config(materials, tmp_path, value)
    found = rank_pool(2).run(settled, tree=asked, cache=str(materials / "cache"), spare=spare, gpu=gpu)
    assert found == [(recomputes, keeps)] * 2


def block_after_run(tree: dict, cache: str) -> tuple[bool, bool]:
    """Run, and say whether freed memory was kept, and whether a large block lies in the heap afterwards."""
    import ctypes

    from safecl.training import trainer

    kept = []
    stop = mock.patch.object(trainer, "stop_keeping_memory", lambda: (kept.append(True), opening.stop_keeping_memory()))
    with stop:
        fit(tree=tree, cache=cache)
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    block = libc.malloc(8 * 2**20)
    heap = next(line for line in open("/proc/self/maps") if "[heap]" in line).split()[0]
    first, last = (int(end, 16) for end in heap.split("-"))
    libc.free.argtypes = [ctypes.c_void_p]
    libc.free(block)
    return bool(kept), first <= block < last


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library is another one")
def test_a_process_that_goes_on_after_its_run_keeps_no_more_memory(rank_pool, materials, tmp_path):
    found = rank_pool(1).run(
        block_after_run, tree=config(materials, tmp_path / "run", False), cache=str(materials / "cache")
    )
    assert found == [(True, False)]


def test_a_run_writes_what_it_chose_and_its_weights_do_not_depend_on_it(rank_pool, materials, tmp_path):
    weights = {}
    for value in ("auto", True):
        folder = tmp_path / str(value)
        rank_pool(2).run(fit, tree=config(materials, folder, value), cache=str(materials / "cache"))
        weights[value] = (folder / "model" / "model.safetensors").read_bytes()
    assert load_config(tmp_path / "auto" / "config.yaml").model.gradient_checkpointing is False
    assert load_config(tmp_path / "True" / "config.yaml").model.gradient_checkpointing is True
    assert weights["auto"] == weights[True]
