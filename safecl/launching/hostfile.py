"""The hostfile of the deepspeed launcher: a line `HOST slots=RANKS` for each node. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

from safecl.config import ConfigError
from safecl.launching.job import Job

HOSTFILE = "hostfile"
_LINE = re.compile(r"(\S+)\s+slots=(\d+)\s*(#.*)?")


def hostfile_of(job: Job, ranks: int) -> str:
    """Return a hostfile with one line a node. Without ssh the names need not be those of machines."""
    nodes, hosts = job.settings.node_range[1], list(job.settings.hosts)
    if not hosts and not job.settings.ssh:
        hosts = [f"node-{index}" for index in range(nodes)]
    if len(hosts) != nodes:
        raise ConfigError(
            f"launch.hosts: {len(hosts)} names for {nodes} nodes; name every node, the first one first, "
            "or give a hostfile of your own (launch.hostfile)"
        )
    return "".join(f"{host} slots={ranks}\n" for host in hosts)


def refuse_wrong_hostfile(job: Job) -> None:
    """Raise ConfigError for a hostfile of the user's own that does not say what the section `launch` says. The launcher
    itself would start one node where the file is missing."""
    settings = job.settings
    if settings.hostfile is None:
        return
    found, nodes = read_hostfile(Path(settings.hostfile)), settings.node_range[1]
    if len(found) != nodes:
        raise ConfigError(
            f"launch.hostfile: {settings.hostfile} names {len(found)} nodes ({', '.join(found)}), but launch.nodes is "
            f"{nodes}; give --nodes {len(found)}, or a line for each node"
        )
    for host, slots in found.items():
        if settings.gpus_per_node not in ("auto", slots):
            raise ConfigError(
                f"launch.hostfile: {settings.hostfile}: {host} has slots={slots}, but launch.gpus_per_node is "
                f"{settings.gpus_per_node}; both are the number of ranks on a node"
            )


def read_hostfile(path: Path) -> dict[str, int]:
    """Return the ranks of each host. Raises ConfigError with the line of a mistake."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a text file"
        raise ConfigError(f"launch.hostfile: {path}: {why}") from None
    found: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        if (match := _LINE.fullmatch(line)) is None or int(match[2]) == 0:
            raise ConfigError(
                f"launch.hostfile: {path}, line {number}: {line!r} is not `HOST slots=RANKS`, such as `node-0 slots=8`"
            )
        if match[1] in found:
            raise ConfigError(f"launch.hostfile: {path}, line {number}: {match[1]} is there already; name a node once")
        found[match[1]] = int(match[2])
    if not found:
        raise ConfigError(f"launch.hostfile: {path}: names no node; write a line `HOST slots=RANKS` for each")
    return found
