"""The deepspeed launcher with a hostfile: the same command on every node (--no_ssh), or once, by pdsh and ssh.

Imports neither torch nor deepspeed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from safecl.config import ConfigError
from safecl.distributed import rank_files
from safecl.launching import network
from safecl.launching.hostfile import HOSTFILE, hostfile_of, refuse_wrong_hostfile
from safecl.launching.job import FILES, Command, Job, Launch, python, timeouts
from safecl.launching.torchrun import describe, first_node, other_first_node, own_address
from safecl.launching.variables import network_variables, threads_of, variables_of


def plan(job: Job, files: Path, node_rank: int | None) -> Launch:
    """Return the command of this node; with launch.ssh, that of all nodes. node_rank: number of this node, from 0.

    Raises ConfigError.
    """
    refuse_wrong_hostfile(job)
    if job.settings.node_range[1] == 1:
        return _one_node(job, files)
    return _by_ssh(job) if job.settings.ssh else _each_by_itself(job, files, node_rank)


def _one_node(job: Job, files: Path) -> Launch:
    ranks = job.ranks_per_node()
    network.refuse_taken_port(job.settings.port, "launch.port")
    wanted = {rank_files.FILES: str(files), rank_files.LOGS: str(job.logs), **threads_of(ranks)}
    places = [f"--num_gpus={ranks}", f"--master_addr={network.LOCALHOST}", f"--master_port={job.settings.port}"]
    variables = variables_of(job.settings, wanted)
    facts = [
        ("ranks", f"1 node x {ranks}, by the deepspeed launcher"),
        ("timeouts", timeouts(job.settings)),
        *variables.facts(),
    ]
    return Launch(facts, Command((*_runner(places), *job.training), variables.to_set()), agent=True, ranks=ranks)


def _each_by_itself(job: Job, files: Path, node_rank: int | None) -> Launch:
    settings, ranks, nodes = job.settings, job.ranks_per_node(), job.settings.node_range[1]
    hostfile = Path(settings.hostfile) if settings.hostfile is not None else files / HOSTFILE
    written = {} if settings.hostfile is not None else {hostfile: hostfile_of(job, ranks)}
    address, (host, port) = own_address(settings), first_node(settings)
    wanted = {rank_files.FILES: str(files), rank_files.LOGS: str(job.logs), **threads_of(ranks)}
    variables = variables_of(settings, wanted | network_variables(address))
    number = _node_rank(node_rank, nodes)
    if number == 0:
        network.refuse_taken_port(port, "launch.rendezvous")
    places = [f"--hostfile={hostfile}", "--no_ssh", f"--node_rank={number}"]
    places += [f"--master_addr={network.resolve(host)}", f"--master_port={port}"]
    facts = [
        ("ranks", f"{nodes} nodes x {ranks}, by the deepspeed launcher on each node"),
        ("hostfile", str(hostfile)),
        ("this node", describe(address, settings)),
        ("timeouts", timeouts(settings)),
        *variables.facts(),
    ]
    command = Command((*_runner(places), *job.training), variables.to_set())
    first = other_first_node(settings)
    return Launch(facts, command, written, agent=True, first_node=first, several=True, ranks=ranks)


def _by_ssh(job: Job) -> Launch:
    """The launcher passes few variables on to other nodes; `env` in front of the ranks passes these."""
    settings, ranks, nodes = job.settings, job.ranks_per_node(), job.settings.node_range[1]
    if shutil.which("pdsh") is None:
        raise ConfigError(
            "launch.ssh: pdsh is not installed here; install it (apt install pdsh), or run the same command on every "
            "node with launch.ssh=false and --node-rank"
        )
    hostfile = Path(settings.hostfile) if settings.hostfile is not None else job.folder / FILES / HOSTFILE
    written = {} if settings.hostfile is not None else {hostfile: hostfile_of(job, ranks)}
    host, port = first_node(settings)
    variables = variables_of(settings, {rank_files.LOGS: str(job.logs.absolute()), **threads_of(ranks)})
    places = [f"--hostfile={hostfile}", "--launcher=pdsh", f"--master_addr={network.resolve(host)}"]
    places += [f"--master_port={port}", "--no_python", "--no_local_rank"]
    ranks_command = [
        "env",
        *(f"{name}={value}" for name, value in variables.for_other_nodes().items()),
        python(),
        "-m",
        "safecl",
    ]
    facts = [
        ("ranks", f"{nodes} nodes x {ranks}, by the deepspeed launcher, pdsh and ssh"),
        ("hostfile", str(hostfile)),
        *variables.facts(),
    ]
    argv = [*_RUNNER, *places, *ranks_command, *job.training]
    return Launch(facts, Command((python(), *argv)), written, agent=True)


_RUNNER = ("-m", "deepspeed.launcher.runner")


def _runner(places: list[str]) -> list[str]:
    return [python(), *_RUNNER, *places, "--module", "safecl"]


def _node_rank(given: int | None, nodes: int) -> int:
    rank = given if given is not None else int(os.environ.get("NODE_RANK") or -1)
    if not 0 <= rank < nodes:
        raise ConfigError(
            f"--node-rank: without ssh every node starts its own ranks and must say which node it is: 0 on the first "
            f"one, up to {nodes - 1}; or let pdsh start all nodes with launch.ssh=true"
        )
    return rank
