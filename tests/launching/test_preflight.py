"""The checks across ranks: what differs is named with the hosts and both values; real ranks agree."""

from __future__ import annotations

from dataclasses import replace

import pytest

from safecl.config import ConfigError
from safecl.launching import facts as facts_module
from safecl.launching.facts import Facts, flatten, quick_hash
from safecl.launching.preflight import Nodes, disagreements, warnings_of

A = Facts(
    rank=0,
    host="a",
    node=("a",),
    versions={"torch": "2.8.0", "safecl": "0.1"},
    config={"train.learning_rate": "2e-05", "output": "runs/x"},
    rows={"task gsm8k": "r1"},
    model="m1",
    clock=1000.0,
    disk=2**40,
    shared_memory=2**34,
    device="H100",
    gpus=8,
    interface="10.0.0.1 on eth0",
)
B = replace(A, rank=1, host="b", node=("b",), interface="10.0.0.2 on eth0")


def both(**changes: object) -> Nodes:
    return Nodes.of([A, replace(B, **changes)])


def test_nodes_that_agree_have_nothing_to_say():
    assert disagreements(both()) == [] and warnings_of(both()) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"versions": {"torch": "2.9.1", "safecl": "0.1"}}, "version of torch: 2.8.0 on a and 2.9.1 on b"),
        ({"versions": {"torch": "2.8.0"}}, "version of safecl: 0.1 on a and absent on b"),
        (
            {"config": A.config | {"train.learning_rate": "1e-05"}},
            "config key train.learning_rate: 2e-05 on a and 1e-05",
        ),
        ({"config": A.config | {"train.epochs": "2"}}, "config key train.epochs: absent on a and 2 on b"),
        ({"rows": {"task gsm8k": "r2"}}, "rows of task gsm8k: r1 on a and r2 on b; every node needs the same files"),
        ({"model": "m2"}, "the files of model.path: m1 on a and m2 on b"),
    ],
)
def test_what_must_not_differ_is_named_with_the_hosts_and_both_values(changes, told):
    (problem,) = disagreements(both(**changes))
    assert told in problem


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"clock": 1090.0}, "the clocks of the nodes are 90 s apart (00:16:40 UTC on a, 00:18:10 UTC on b)"),
        ({"disk": 2**20}, "has 1.0 MB left, as b sees it"),
        ({"shared_memory": 64 * 2**20}, "/dev/shm of b has 67.1 MB"),
        ({"device": "A100"}, "the nodes differ in the GPU: H100 on a and A100 on b"),
        ({"gpus": 4}, "the number of GPUs: 8 on a and 4 on b"),
    ],
)
def test_what_may_spoil_the_run_is_a_warning(changes, told):
    (warning,) = warnings_of(both(**changes))
    assert told in warning


def test_a_long_list_of_differences_is_cut():
    other = {f"key{index}": "1" for index in range(20)}
    found = disagreements(both(config=other))
    assert len(found) == 9 and found[-1] == "and 14 more differences"


def test_keys_that_name_places_and_the_launch_itself_may_differ(tmp_path):
    tree = {
        "launch": {"interface": "x"},
        "tasks": [{"name": "a", "train": "t"}],
        "model": {"path": "p", "dtype": "bf16"},
    }
    kept = [key for key in flatten(tree) if not facts_module._is_per_node(key)]
    assert kept == ["tasks.0.name", "model.dtype"]


def test_the_quick_hash_finds_another_byte_in_a_sample_and_another_size(tmp_path):
    path = tmp_path / "model.safetensors"
    data = bytearray(10**6)
    path.write_bytes(data)
    first = quick_hash([path])
    data[10**6 // 16 * 7] = 1
    path.write_bytes(data)
    assert quick_hash([path]) != first
    path.write_bytes(bytes(10**6 + 1))
    assert quick_hash([path]) != first
    path.write_bytes(bytes(10**6))
    assert quick_hash([path]) == first


def test_real_ranks_on_hosts_of_their_own_compare_what_they_see(rank_pool, tmp_path):
    """Two ranks that take themselves for two hosts: they agree, they differ, the folder of one is another one."""
    from tests.launching import preflight_scenes

    said = rank_pool(2).run(preflight_scenes.agree, folder=str(tmp_path))
    assert said[1] == [] and any("2 nodes, 2 ranks agree" in line and "GB/s" in line for line in said[0])
    assert any("prepared data" in line and "once per node" in line for line in said[0])
    moved = rank_pool(2).run(preflight_scenes.artifacts_of, folder=str(tmp_path))
    assert moved == [str(tmp_path / "run" / "artifacts")] * 2
    messages = rank_pool(2).run(preflight_scenes.differ, folder=str(tmp_path))
    assert messages[0] == messages[1] and "train.seed: 0 on host-0 and 1 on host-1" in messages[0]
    messages = rank_pool(2).run(preflight_scenes.not_shared, folder=str(tmp_path))
    assert (
        messages[0] == messages[1] and "is not shared: host-1 cannot see a file that host-0 has written" in messages[0]
    )
    said = rank_pool(2).run(preflight_scenes.without_locks, folder=str(tmp_path))
    assert any("locks do not reach across nodes" in line for line in said[0])
    assert ConfigError.__name__  # what the scenes catch
