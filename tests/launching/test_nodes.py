"""Two hosts in namespaces: a run leaves what the same ranks leave on one host, bit for bit; a config that differs is
named. Where namespaces are forbidden, two agents on this machine stand in for the hosts.

Lost hosts, slow links and restarts are in benchmarks/faults/sections.py nodes.
"""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from tests.launching import hosts, node_scenes, slow_link
from tests.launching.node_scenes import Job, left, two_hosts, write_config

APART = hosts.reason_against() is None


@pytest.mark.skipif(not APART, reason=str(hosts.reason_against()))
def test_hosts_share_nothing_but_what_is_shared(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    with two_hosts([shared]) as (a, b):
        tell = f"hostname; ls {tmp_path}; touch /tmp/own /dev/shm/own; ip -4 -brief addr show eth0"
        assert a.start("sh", "-c", tell, log=shared / "a.log").wait() == 0
        assert b.start("sh", "-c", "hostname; ls /tmp/own /dev/shm/own", log=shared / "b.log").wait() != 0
    assert (shared / "a.log").read_text().split()[:2] == ["a", "shared"] and a.ip in (shared / "a.log").read_text()
    assert (shared / "b.log").read_text().startswith("b\n")


def test_a_slow_link_passes_what_both_ends_send_at_once():
    """Its two ends are threads here, and its tunnels are pairs of sockets."""
    ends, tunnels = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET), []
    for end in ends:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        tunnels.append(ours)
        threading.Thread(target=slow_link.pump, args=(theirs.detach(), end, 0.02), daemon=True).start()
    packet, count, arrived = b"x" * 9000, 2000, [0, 0]

    def receive(index: int) -> None:
        for _ in range(count):
            arrived[index] += len(tunnels[index].recv(65536))

    work = [threading.Thread(target=receive, args=(index,), daemon=True) for index in (0, 1)]
    work += [
        threading.Thread(target=lambda tunnel=tunnel: [tunnel.send(packet) for _ in range(count)], daemon=True)
        for tunnel in tunnels
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join(60.0)
    assert arrived == [count * len(packet)] * 2
    for tunnel in tunnels:
        tunnel.close()


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    from safecl.demo.materials import write_materials

    folder = tmp_path_factory.mktemp("demo")
    write_materials(folder)
    return folder


@pytest.mark.long
def test_two_hosts_leave_what_two_ranks_on_one_host_leave_and_a_stop_in_between_changes_nothing(
    materials, tmp_path, rank_pool
):
    from tests.distributed import stop_scenes

    config = write_config(materials, tmp_path / "two" / "run.yaml", deepspeed={"stage": 3})
    with two_hosts([tmp_path, materials]) as machines:
        job = Job(config, machines)
        assert node_scenes.stop_and_go_on(job, at_step=2) == []
        said = job.said()
    if APART:
        assert "2 nodes, 2 ranks agree; a 10.77." in said and "GB/s" in said
        assert f"artifacts      {job.folder}/artifacts" in said and "once per node" in said
    assert {path.name for path in (job.folder / "logs").glob("*.log")} == {"rank-00000.log", "rank-00001.log"}
    tree = node_scenes.yaml.safe_load(config.read_text()) | {"output": str(tmp_path / "one")}
    rank_pool(2).run(stop_scenes.fit, tree=tree, cache=str(tmp_path / "cache"))
    assert left(job.folder) == left(tmp_path / "one")


@pytest.mark.long
@pytest.mark.skipif(node_scenes.why_no_ssh() is not None, reason=str(node_scenes.why_no_ssh()))
def test_the_deepspeed_launcher_starts_two_hosts_by_ssh(materials, tmp_path, rank_pool):
    from tests.distributed import stop_scenes

    config = write_config(materials, tmp_path / "two" / "run.yaml")
    with two_hosts([tmp_path, materials]) as machines:
        code, said = node_scenes.run_by_ssh(machines, config, tmp_path / "keys")
    assert code == 0, said[-3000:]
    assert "2 nodes, 2 ranks agree; a 10.77." in said
    tree = node_scenes.yaml.safe_load(config.read_text()) | {"output": str(tmp_path / "one")}
    rank_pool(2).run(stop_scenes.fit, tree=tree, cache=str(tmp_path / "cache"))
    assert left(tmp_path / "two" / "run") == left(tmp_path / "one")


def test_another_config_on_the_second_host_is_refused_on_both_with_both_values(materials, tmp_path):
    config = write_config(materials, tmp_path / "two" / "run.yaml")
    other = write_config(materials, tmp_path / "two" / "old.yaml", train={"seed": 7})
    with two_hosts([tmp_path, materials]) as machines:
        job = Job(config, machines)
        job.start_one(0, "2")
        job.start_one(1, "2", config=other)
        assert job.wait() == [2, 2], job.said()[-3000:]
        assert "the nodes differ in the config key train.seed: 0 on " in " ".join(job.said().split())
        assert not APART or "train.seed: 0 on a and 7 on b" in " ".join(job.said().split())
        assert "Traceback" not in job.said() and "Failures:" not in job.said()
