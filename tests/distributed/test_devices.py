"""One rule for devices: DeepSpeed's accelerator decides, also on the CPU of a machine with GPUs. A GPU machine is a
stand-in here."""

from __future__ import annotations

import ast
import os
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from safecl.config import ConfigError
from safecl.distributed import collectives, devices

PACKAGE = Path(devices.__file__).parents[1]


@pytest.fixture
def gpus(monkeypatch):
    """`gpus(number)` makes torch see so many GPUs; returns the list of devices that were made the current one."""

    def see(number: int) -> list[int]:
        current: list[int] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
        return current

    return see


def test_ranks_on_the_cpu_of_a_machine_with_gpus_use_gloo_and_no_gpu(gpus):
    current = gpus(2)
    assert os.environ["DS_ACCELERATOR"] == "cpu"  # tests/conftest.py
    assert (devices.accelerator(), devices.backend(), str(devices.device())) == ("cpu", "gloo", "cpu")
    devices.settle()
    assert not devices.on_gpu() and not current


def test_no_module_asks_torch_whether_there_is_a_gpu_instead_of_the_rule():
    """The exceptions describe the machine: `safecl env`, and the choice of what DeepSpeed has not chosen yet."""
    allowed = {"distributed/devices.py", "commands/env.py"}
    asking = set()
    for path in PACKAGE.rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
        if any(node.attr == "is_available" and "cuda" in ast.unparse(node.value) for node in calls):
            asking.add(str(path.relative_to(PACKAGE)))
    assert asking <= allowed, asking


@pytest.mark.parametrize(
    ("environ", "number", "words"),
    [
        ({"DS_ACCELERATOR": "xpu"}, 0, "DS_ACCELERATOR=xpu: safecl runs on cuda and cpu"),
        ({"DS_ACCELERATOR": "cuda"}, 0, "torch sees no GPU"),
        ({"DS_ACCELERATOR": "cuda", "LOCAL_RANK": "3"}, 2, "LOCAL_RANK is 3, but this process sees 2 GPUs"),
    ],
)
def test_an_accelerator_or_a_gpu_that_is_not_there_is_named(gpus, environ, number, words):
    gpus(number)
    with pytest.raises(ConfigError, match=words):
        devices.settle(environ)


def test_a_task_that_sees_one_gpu_uses_it_whatever_its_local_rank_is(gpus):
    """DeepSpeed numbers devices by LOCAL_RANK, which would be an invalid ordinal."""
    current, environ = gpus(1), {"DS_ACCELERATOR": "cuda", "LOCAL_RANK": "3"}
    devices.settle(environ)
    assert environ["LOCAL_RANK"] == "0" and current == [0]


def test_each_rank_of_a_node_takes_its_own_gpu(gpus):
    current, environ = gpus(8), {"DS_ACCELERATOR": "cuda", "LOCAL_RANK": "3"}
    devices.settle(environ)
    assert environ["LOCAL_RANK"] == "3" and current == [3]


def shared_gpu(uuids: list[str]) -> str:
    """Message of the check on ranks whose GPUs have these names."""
    import torch.distributed as dist

    before = torch.cuda.get_device_properties, devices.on_gpu, torch.cuda.current_device
    torch.cuda.get_device_properties = lambda index: SimpleNamespace(uuid=uuids[dist.get_rank()])
    devices.on_gpu, torch.cuda.current_device = lambda: True, lambda: 0
    try:
        collectives._refuse_shared_gpus()
    except ConfigError as error:
        return str(error)
    finally:
        torch.cuda.get_device_properties, devices.on_gpu, torch.cuda.current_device = before
    return ""


def test_two_ranks_on_one_gpu_are_named_on_all_ranks(rank_pool):
    assert all("ranks 0 and 1 have the same GPU (A)" in text for text in rank_pool(2).run(shared_gpu, uuids=["A", "A"]))
    assert rank_pool(2).run(shared_gpu, uuids=["A", "B"]) == ["", ""]


def rank_0_works(how: str) -> str:
    """`how`: the call in which rank 1 waits for twice the time limit of tensors."""
    import time

    import torch.distributed as dist

    limit = timedelta(seconds=0.5)
    group = dist.new_group(backend="gloo", timeout=limit)
    began = dist.distributed_c10d._get_default_timeout("gloo")
    dist.distributed_c10d._set_pg_timeout(limit)
    try:
        if how == "on tensors":
            time.sleep(1.2 * (dist.get_rank() == 0))
            dist.all_reduce(torch.ones(1), group=group)
        else:
            collectives.on_first_rank(lambda: time.sleep(1.2))
            time.sleep(1.2 * (dist.get_rank() == 0))
            collectives.barrier()
            time.sleep(1.2 * (dist.get_rank() == 0))
            assert collectives.any_rank(dist.get_rank() == 1)
    except RuntimeError as error:
        return str(error)
    finally:
        dist.distributed_c10d._set_pg_timeout(began)
    return "waited"


def test_ranks_wait_patiently_for_the_long_work_of_rank_0_but_not_for_its_tensors():
    from tests.pool import RankPool

    assert collectives.START_TIMEOUT == timedelta(seconds=300)
    pool = RankPool(2, forked=True)  # of its own: a call that ran out of time ends its group
    try:
        assert pool.run(rank_0_works, how="patiently") == ["waited", "waited"]
        late = pool.run(rank_0_works, how="on tensors")
        assert any("Timed out" in text or "timeout" in text.lower() for text in late), late
    finally:
        pool.close()
