"""`safecl launch`: what is printed is what is run, on one node and several, and whose each environment variable is."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
from pathlib import Path

import pytest

from safecl.config import ConfigError
from safecl.launching import agent, network
from safecl.launching.job import Command
from safecl.training.folder import RunFolder


def command_in(out: str) -> list[str]:
    return shlex.split(out.splitlines()[-1])


def test_what_is_printed_is_what_is_run(safecl, config, monkeypatch):
    ran: list[Command] = []

    def start(command: Command) -> subprocess.Popen:
        ran.append(command)
        return subprocess.Popen(["true"])

    monkeypatch.setattr(agent, "start", start)
    code, out, _ = safecl("launch", config, "train.max_steps=3", "--", "--fresh")
    printed = command_in(out)
    (command,) = ran
    assert code == 1  # no rank has left a code, so the run did not succeed, whatever the launcher says
    assignments = [f"{name}={value}" for name, value in command.environment.items()]
    assert printed == ["env", *assignments, *command.argv]
    assert printed[-5:] == ["safecl", "train", str(config), "train.max_steps=3", "--fresh"]
    assert command.environment["SAFECL_RANK_LOGS"].endswith("run-A_1/logs")
    _, out, _ = safecl("launch", config, "train.max_steps=3", "--dry-run", "--", "--fresh")
    assert command_in(out) == printed and len(ran) == 1


def test_several_nodes_meet_at_the_first_one_by_its_address_and_interface(safecl, config):
    code, out, _ = safecl("launch", config, "--nodes", "2", "--rendezvous", "127.0.0.1:4321", "--dry-run")
    words = command_in(out)
    assert code == 0 and "127.0.0.1 on lo (the route to the first node)" in out
    for word in (
        "--nnodes=2",
        "--nproc-per-node=2",
        "--rdzv-endpoint=127.0.0.1:4321",
        "--rdzv-id=run-a-1",
        "--local-addr=127.0.0.1",
        "GLOO_SOCKET_IFNAME=lo",
        "NCCL_SOCKET_IFNAME=lo",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",  # else a node that comes back waits for ever
    ):
        assert word in words
    assert not any("is_host" in word for word in words)  # torch itself finds out for agents on one machine
    assert "timeouts        600 s until all nodes are there, 600 s to save after a signal" in out
    _, out, _ = safecl("launch", config, "--nodes", "1:4", "--rendezvous", "127.0.0.1", "--dry-run")
    assert "600 s until 1 is there, 30 s more for others" in out
    assert "--nnodes=1:4" in command_in(out) and "--rdzv-endpoint=127.0.0.1:29500" in command_in(out)


def test_the_users_own_variables_are_kept_and_told_apart(safecl, config):
    os.environ |= {"NCCL_SOCKET_IFNAME": "eth7", "NCCL_DEBUG": "INFO", "HF_TOKEN": "hf_secret", "OMP_NUM_THREADS": "5"}
    two = ("--nodes", "2", "--rendezvous", "127.0.0.1", "launch.environment={NCCL_DEBUG: WARN}", "--dry-run")
    _, out, _ = safecl("launch", config, *two)
    facts = {line[:16].strip(): line[16:] for line in out.splitlines()}
    assert "GLOO_SOCKET_IFNAME=lo" in facts["set by safecl"] and "NCCL_SOCKET_IFNAME" not in facts["set by safecl"]
    assert facts["by the config"] == "NCCL_DEBUG=WARN" and facts["yours, replaced"] == "NCCL_DEBUG=INFO"
    assert "NCCL_SOCKET_IFNAME=eth7" in facts["yours, kept"] and "OMP_NUM_THREADS=5" in facts["yours, kept"]
    assert "hf_secret" not in out and "HF_TOKEN=(hidden)" in out
    assert "NCCL_DEBUG=WARN" in command_in(out) and "OMP_NUM_THREADS=5" not in command_in(out)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--nodes", "2"), "2 nodes must agree on the first one; run the same command on every node, with `--rendezv"),
        (("--nodes", "0:2"), "'0:2' is not a number of nodes; give 2, or 1:4"),
        (("--nodes", "2", "--rendezvous", "no such host"), "is not host:port"),
        (("--nodes", "2", "--rendezvous", "a.invalid"), "cannot resolve this name"),
        (("--nodes", "2", "--rendezvous", "127.0.0.1", "launch.interface=eth9"), "no such interface with an IPv4 addr"),
        (("--via", "deepspeed", "--nodes", "2", "--rendezvous", "127.0.0.1"), "must say which node it is: 0 on the fi"),
        (("--via", "deepspeed", "--nodes", "1:2"), "nodes: 1:2 is for torchrun"),
        (
            ("--via", "slrum"),
            "launch.via: must be 'torchrun', 'deepspeed', 'slurm' or 'kubernetes'; did you mean 'slurm'?",
        ),
        (("--via", "slurm", "launch.gpus_per_node=auto"), "auto counts the GPUs of this machine, but slurm starts the"),
        (("--sweep", "train.seed=1,2"), "is for --via slurm"),
        (("--via", "slurm", "--sweep", "train.seed"), "give a key and its values"),
        (("--via", "kubernetes"), "launch.kubernetes.image: is needed"),
        (("tasks.0.train=none.jsonl",), "none.jsonl: no such file"),
    ],
)
def test_what_would_not_start_is_refused_with_what_works(safecl, config, arguments, told):
    code, _, err = safecl("launch", config, *arguments, "--dry-run")
    assert code == 2 and told in " ".join(err.split())


def test_a_host_name_that_is_only_this_machine_is_refused(safecl, config, monkeypatch):
    """Debian writes `127.0.1.1 HOST` into /etc/hosts; other nodes would be told to connect to themselves."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(0, 0, 0, "", ("127.0.1.1", 0))])
    code, _, err = safecl("launch", config, "--nodes", "2", "--rendezvous", "node-0", "--dry-run")
    assert code == 2 and "node-0 is 127.0.1.1 on this machine (see /etc/hosts)" in err


def test_the_deepspeed_launcher_gets_a_hostfile_with_every_node(safecl, config, tmp_path):
    two = ("--via", "deepspeed", "--nodes", "2", "--rendezvous", "127.0.0.1:4000", "--dry-run")
    _, out, _ = safecl("launch", config, *two, "--node-rank", "1", "launch.hosts=[a,b]")
    assert "a slots=2\nb slots=2\n" in out
    words = command_in(out)
    assert "--no_ssh" in words and "--node_rank=1" in words and "--master_addr=127.0.0.1" in words
    assert words[words.index("--module") + 1] == "safecl"
    code, _, err = safecl("launch", config, *two, "--node-rank", "1", "launch.hosts=[a]")
    assert code == 2 and "launch.hosts: 1 names for 2 nodes" in err


def test_with_ssh_the_variables_travel_in_front_of_the_ranks(safecl, config, monkeypatch):
    """The launcher itself passes on only those that it knows."""
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    ssh = ("--via", "deepspeed", "--nodes", "2", "--rendezvous", "127.0.0.1", "launch.ssh=true", "launch.hosts=[a,b]")
    _, out, _ = safecl("launch", config, *ssh, "launch.environment={FI_PROVIDER: efa}", "--dry-run")
    words = command_in(out)
    assert words[0] != "env" and "FI_PROVIDER=efa" in words[words.index("env") : words.index("safecl")]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("a slots=2\nb slot=2\n", "hosts, line 2: 'b slot=2' is not `HOST slots=RANKS`"),
        ("# two nodes\na slots=2\n\na slots=2\n", "hosts, line 4: a is there already"),
        ("a slots=0\n", "line 1: 'a slots=0' is not"),
        ("# none\n", "names no node"),
        (None, "hosts: No such file or directory"),
        ("a slots=2\n", "names 1 nodes (a), but launch.nodes is 2; give --nodes 1"),
        ("a slots=2\nb slots=4\n", "b has slots=4, but launch.gpus_per_node is 2"),
    ],
)
def test_a_wrong_hostfile_is_refused_by_its_line(safecl, config, tmp_path, lines, told):
    if lines is not None:
        (tmp_path / "hosts").write_text(lines)
    two = ("--via", "deepspeed", "--nodes", "2", "--rendezvous", "127.0.0.1", "--node-rank", "0")
    code, _, err = safecl("launch", config, *two, f"launch.hostfile={tmp_path / 'hosts'}", "--dry-run")
    assert code == 2 and told in " ".join(err.split())


def test_a_hostfile_of_ones_own_is_used(safecl, config, tmp_path):
    (tmp_path / "hosts").write_text("a slots=2  # the first one\nb slots=2\n")
    two = ("--via", "deepspeed", "--nodes", "2", "--rendezvous", "127.0.0.1", "--node-rank", "1")
    _, out, _ = safecl("launch", config, *two, f"launch.hostfile={tmp_path / 'hosts'}", "--dry-run")
    assert f"--hostfile={tmp_path / 'hosts'}" in command_in(out)


@pytest.mark.parametrize("options", [("--nodes", "2"), ("--nodes", "2", "--via", "deepspeed", "--node-rank", "0")])
def test_a_port_that_somebody_listens_on_is_refused_with_who_it_is(safecl, config, options):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = safecl("launch", config, *options, "--rendezvous", f"127.0.0.1:{port}", "--dry-run")
    said = " ".join(err.split())
    assert code == 2 and f"launch.rendezvous: port {port} of this machine" in said
    assert f"is in use by process {os.getpid()} (" in said


def test_agents_of_one_job_on_one_machine_share_the_port():
    with socket.create_server(("", 0)) as taken:
        word = Path("/proc/self/cmdline").read_text().split("\0")[0]
        port = taken.getsockname()[1]
        network.refuse_taken_port(port, "launch.rendezvous", partner=word)
        with pytest.raises(ConfigError, match=f"port {port} .*is in use by process {os.getpid()} "):
            network.refuse_taken_port(port, "launch.rendezvous", partner="another-program")


def test_a_second_launch_of_a_run_that_is_under_way_is_refused_before_anything_starts(safecl, config, tmp_path):
    run = RunFolder(tmp_path / "run-A_1")
    run.lock()
    code, _, err = safecl("launch", config)
    assert code == 2 and f"run-A_1 is in use by process {os.getpid()} on " in " ".join(err.split())
    (run.path / "run.lock").write_text("process 1 on another-host\n")
    run.refuse_where_in_use(host=socket.gethostname())  # this node comes back to it
    run.release()
    run.refuse_where_in_use()


@pytest.mark.parametrize(("own", "told"), [(True, ",is_host=1"), (False, ",is_host=0")])
def test_the_node_with_the_address_keeps_the_store_whatever_its_name(safecl, config, monkeypatch, own, told):
    monkeypatch.setattr(network, "is_own", lambda ip: own)
    monkeypatch.setattr(network, "_source_of_route", lambda ip: "127.0.0.1")
    _, out, _ = safecl("launch", config, "--nodes", "2", "--rendezvous", "192.0.2.1:29500", "--dry-run")
    assert next(word for word in command_in(out) if word.startswith("--rdzv-conf=")).endswith(told)


def test_an_own_address_is_found_by_its_interface():
    assert network.address_towards("127.0.0.1") == network.Address("127.0.0.1", "lo")
    assert network.is_own("127.0.0.1") and not network.is_own("192.0.2.1")


def test_with_ssh_the_users_own_variables_arrive_on_all_nodes_and_secrets_do_not(safecl, config, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    os.environ |= {"NCCL_DEBUG": "INFO", "HF_TOKEN": "hf_1234"}
    ssh = ("--via", "deepspeed", "--nodes", "2", "--rendezvous", "127.0.0.1", "launch.ssh=true", "launch.hosts=[a,b]")
    _, out, _ = safecl("launch", config, *ssh, "--dry-run")
    assert "NCCL_DEBUG=INFO" in command_in(out) and "hf_1234" not in out


def test_gloo_uses_the_interface_towards_the_first_rank_where_nobody_has_chosen_one(monkeypatch):
    monkeypatch.setattr(network, "address_towards", lambda ip: network.Address("10.0.0.2", "eth7"))
    rank = {"MASTER_ADDR": "10.0.0.1", "WORLD_SIZE": "2"}
    for changes, chosen in (
        ({}, "eth7"),
        ({"GLOO_SOCKET_IFNAME": "ib0"}, "ib0"),
        ({"MASTER_ADDR": "127.0.0.1"}, None),
        ({"WORLD_SIZE": "1"}, None),
        ({"MASTER_ADDR": "no-such-host.invalid"}, None),
    ):
        environ = rank | changes
        network.settle_interface(environ)
        assert environ.get("GLOO_SOCKET_IFNAME") == chosen
