"""torchrun: one agent on each node; several nodes meet at the first one (c10d rendezvous). Imports no torch."""

from __future__ import annotations

import socket
from pathlib import Path

from safecl.config import ConfigError, LaunchConfig
from safecl.distributed import rank_files
from safecl.launching import network
from safecl.launching.job import Command, Job, Launch, python, timeouts
from safecl.launching.variables import network_variables, threads_of, variables_of

NO_SHARED_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""torchrun would keep the address of the ranks' store, and the store with its keys, when the nodes meet again: a node
that comes back then waits for that address for ever, since nobody writes it a second time."""


def plan(job: Job, files: Path) -> Launch:
    """Return the command of this node. files: the agent's folder. Raises ConfigError."""
    settings, ranks = job.settings, job.ranks_per_node()
    smallest, largest = settings.node_range
    wanted = {rank_files.FILES: str(files), rank_files.LOGS: str(job.logs), **threads_of(ranks)}
    places, facts = _alone()
    if largest > 1:
        address = own_address(settings)
        places, facts = _meeting(job, address)
        wanted |= network_variables(address) | NO_SHARED_STORE
    nodes = f"{smallest}" if smallest == largest else f"{smallest} to {largest}"
    variables = variables_of(settings, wanted)
    argv = [python(), "-m", "torch.distributed.run", *places, f"--nproc-per-node={ranks}", "-m", "safecl"]
    return Launch(
        [
            ("ranks", f"{nodes} node{'s' * (largest > 1)} x {ranks}, by torchrun"),
            *facts,
            ("timeouts", timeouts(settings)),
            *variables.facts(),
        ],
        Command((*argv, *job.training), variables.to_set()),
        agent=True,
        first_node=other_first_node(settings) if largest > 1 else None,
        several=largest > 1,
        ranks=ranks,
    )


def _alone() -> tuple[list[str], list[tuple[str, str]]]:
    """The same as `_meeting`, for one node."""
    return ["--standalone", f"--local-addr={network.LOCALHOST}"], []


def _meeting(job: Job, address: network.Address) -> tuple[list[str], list[tuple[str, str]]]:
    """Return where the nodes meet, as torchrun's arguments and as lines for people."""
    endpoint = first_node(job.settings)
    is_first = network.is_own(_ip(endpoint))
    if is_first:
        network.refuse_taken_port(endpoint[1], "launch.rendezvous", partner=_identity(job))
    first = f"{endpoint[0]}:{endpoint[1]}" + (", which is this one" if is_first else "")
    facts = [("first node", first), ("this node", describe(address, job.settings))]
    return _rendezvous(job, endpoint, address), facts


def _rendezvous(job: Job, endpoint: tuple[str, int], address: network.Address) -> list[str]:
    settings, (smallest, largest) = job.settings, job.settings.node_range
    conf = {
        "join_timeout": settings.start_timeout,
        "last_call_timeout": settings.last_call,
        "read_timeout": settings.start_timeout,
    }
    if not (ip := _ip(endpoint)).startswith("127."):
        # torch compares host names to find out who keeps the store, which fails for names that do not resolve.
        conf["is_host"] = int(network.is_own(ip))
    return [
        f"--nnodes={smallest}:{largest}" if smallest != largest else f"--nnodes={largest}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={endpoint[0]}:{endpoint[1]}",
        _identity(job),
        f"--rdzv-conf={','.join(f'{key}={value}' for key, value in conf.items())}",
        f"--local-addr={address.ip}",
    ]


def _identity(job: Job) -> str:
    """The word of the command line that agents of one job share."""
    return f"--rdzv-id={job.name}"


def first_node(settings: LaunchConfig) -> tuple[str, int]:
    """Return (host, port) where the nodes meet. Raises ConfigError where nothing says it."""
    if settings.rendezvous is None:
        raise ConfigError(
            f"launch.rendezvous: {settings.nodes} nodes must agree on the first one; run the same command on every "
            "node, with `--rendezvous HOST:PORT`, where HOST is the name or address of one of them"
        )
    return network.split_endpoint(settings.rendezvous, settings.port)


def own_address(settings: LaunchConfig) -> network.Address:
    """Return the address of this node that the others reach. Raises ConfigError."""
    if settings.interface is not None:
        return network.address_of(settings.interface)
    host, _ = first_node(settings)
    ip = network.resolve(host)
    if ip.startswith("127.") and not host.startswith("127.") and host != "localhost":
        raise ConfigError(
            f"launch.rendezvous: {host} is {ip} on this machine (see /etc/hosts), which other nodes cannot reach; give "
            "the address of the first node instead, as `ip -4 addr` shows it there"
        )
    return network.address_towards(ip)


def other_first_node(settings: LaunchConfig) -> tuple[str, int] | None:
    """Return the address of the first node; None on that node itself."""
    host, port = first_node(settings)
    ip = network.resolve(host)
    return None if network.is_own(ip) else (ip, port)


def describe(address: network.Address, settings: LaunchConfig) -> str:
    """Return the node's name, address and interface for people."""
    why = "launch.interface" if settings.interface is not None else "the route to the first node"
    return f"{socket.gethostname()}, {address.ip} on {address.interface or 'no interface of this machine'} ({why})"


def _ip(endpoint: tuple[str, int]) -> str:
    return network.resolve(endpoint[0])
