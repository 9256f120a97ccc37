"""The checks across ranks before a model is loaded: same software, config, rows and model; a folder that all nodes
see, with locks; clocks, disk, /dev/shm and GPUs; and a measured all-reduce between nodes.

What would spoil the run is an error on all ranks (exit code 2), what may is a note. Both name the hosts and the values.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from safecl.config import ArtifactsConfig, ConfigError, RunConfig
from safecl.distributed import collectives
from safecl.launching.facts import Facts, facts_here
from safecl.storage.cache_folder import ARTIFACTS, artifact_folder, prepared_folder
from safecl.storage.locks import FileLock
from safecl.storage.sizes import format_bytes

MOST_SKEW = 2.0
"""Seconds by which clocks may differ without a note."""
LEAST_DISK = 10 * 2**30
LEAST_SHARED_MEMORY = 2**30
MESSAGE_BYTES = 64 * 2**20
SECONDS_FOR_A_FILE = 5.0
"""A network file system may show a new file this late."""
SECONDS_FOR_A_CACHE = 1.0
"""The same for caches, which need not be shared: one that is taken for several costs no more than some work."""
MOST_SHOWN = 8


@dataclass(frozen=True)
class Nodes:
    """The facts of all ranks, and of the first rank of each node."""

    ranks: list[Facts]
    firsts: list[Facts]

    @classmethod
    def of(cls, ranks: list[Facts]) -> Nodes:
        firsts: dict[tuple[str, ...], Facts] = {}
        for facts in ranks:
            firsts.setdefault(facts.node, facts)
        return cls(ranks, list(firsts.values()))


def check_ranks(
    config: RunConfig,
    rows: Mapping[str, str],
    model_files: Iterable[Path],
    versions: Mapping[str, str],
    note: Callable[[str], None],
    lock: str,
) -> RunConfig:
    """Compare what all ranks see, and return the config with a store of artifacts that all nodes see.

    A collective call, in a process group. Rank 0 holds the lock `lock` in the run folder. note: prints a line on rank
    0. Raises ConfigError on all ranks.
    """
    began = time.perf_counter()
    nodes = Nodes.of(collectives.gather_objects([facts_here(config, rows, model_files, versions)]))
    if problems := disagreements(nodes):
        with contextlib.suppress(RuntimeError):  # no rank ends, and takes its connections with it, before all know
            collectives.barrier()
        raise ConfigError("\n".join(problems))
    for warning in warnings_of(nodes):
        note(f"warning: {warning}")
    if len(nodes.firsts) == 1:
        return config
    folder = Path(config.output)
    _check_shared_folder(nodes, folder, note, lock)
    config = _shared_artifacts(config, nodes, note)
    seconds, rate = all_reduce_rate()
    network = ", ".join(f"{each.host} {each.interface}" for each in nodes.firsts)
    note(
        f"preflight      {len(nodes.firsts)} nodes, {len(nodes.ranks)} ranks agree; {network}; clocks within "
        f"{skew_of(nodes):.2f} s; all-reduce of {format_bytes(MESSAGE_BYTES)} in {seconds:.2f} s "
        f"({rate / 1e9:.2f} GB/s); checked in {time.perf_counter() - began:.1f} s"
    )
    return config


# ---------------------------------------------------------------------------------------------------------- comparisons


def disagreements(nodes: Nodes) -> list[str]:
    """Return a line for everything in which ranks must not differ and do. Ranks are compared with rank 0."""
    problems = []
    for what, advice in (
        ("versions", "install the same versions on every node"),
        ("config", "start every node with the same config file and overrides"),
        ("rows", "every node needs the same files"),
    ):
        for name, groups in _differences(nodes.ranks, what):
            label = {"versions": f"version of {name}", "config": f"config key {name}", "rows": f"rows of {name}"}[what]
            problems.append(f"the nodes differ in the {label}: {groups}; {advice}")
    models = _grouped({each.rank: each.model for each in nodes.ranks}, nodes.ranks)
    if models is not None:
        problems.append(f"the nodes differ in the files of model.path: {models}; every node needs the same files")
    hidden = len(problems) - MOST_SHOWN
    return [*problems[:MOST_SHOWN], f"and {hidden} more differences"] if hidden > 0 else problems


def _differences(ranks: list[Facts], what: str) -> Iterable[tuple[str, str]]:
    values: list[tuple[Facts, Mapping[str, str]]] = [(each, getattr(each, what)) for each in ranks]
    for name in dict.fromkeys(name for _, found in values for name in found):
        groups = _grouped({each.rank: found.get(name, "absent") for each, found in values}, ranks)
        if groups is not None:
            yield name, groups


def _grouped(values: Mapping[int, str], ranks: list[Facts]) -> str | None:
    """Return `value on host, host; other value on host`; None where all are equal."""
    if len(set(values.values())) == 1:
        return None
    hosts: dict[str, dict[str, None]] = {}
    for each in ranks:
        hosts.setdefault(values[each.rank], {})[each.host] = None
    return " and ".join(f"{value} on {', '.join(names)}" for value, names in hosts.items())


def warnings_of(nodes: Nodes) -> list[str]:
    """Return a line for everything that may spoil the run: clocks, disk, /dev/shm, GPUs."""
    firsts, found = nodes.firsts, []
    if (skew := skew_of(nodes)) > MOST_SKEW:
        clocks = ", ".join(f"{_time(each.clock)} on {each.host}" for each in firsts)
        found.append(f"the clocks of the nodes are {skew:.0f} s apart ({clocks}): start a time service, such as chrony")
    for each in firsts:
        if each.disk < LEAST_DISK:
            found.append(f"the disk of the run folder has {format_bytes(each.disk)} left, as {each.host} sees it")
        if each.shared_memory < LEAST_SHARED_MEMORY:
            found.append(
                f"/dev/shm of {each.host} has {format_bytes(each.shared_memory)}, which is little for NCCL and data "
                "loading; give the container more (docker --shm-size=16g, a Kubernetes emptyDir with medium: Memory)"
            )
    for what, values in (
        ("GPU", {each.rank: each.device for each in nodes.ranks}),
        ("number of GPUs", {each.rank: str(each.gpus) for each in nodes.ranks}),
    ):
        if (groups := _grouped(values, nodes.ranks)) is not None:
            found.append(f"the nodes differ in the {what}: {groups}; the slowest one sets the pace")
    return found


def skew_of(nodes: Nodes) -> float:
    """Seconds between the earliest and the latest clock of the nodes."""
    clocks = [each.clock for each in nodes.firsts]
    return max(clocks) - min(clocks)


def _time(clock: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(clock)) + " UTC"


# -------------------------------------------------------------------------------------------------------- shared folder


def _check_shared_folder(nodes: Nodes, folder: Path, note: Callable[[str], None], lock: str) -> None:
    """Raise ConfigError where a node does not see what rank 0 writes; note locks that do not reach across nodes."""
    (blind,) = _nodes_that_do_not_see(nodes, [folder], SECONDS_FOR_A_FILE)
    if blind:
        raise ConfigError(
            f"output: {folder} is not shared: {', '.join(blind)} cannot see a file that {nodes.firsts[0].host} has "
            "written there; choose a folder that every node sees, such as one on NFS"
        )
    lockable = [False]
    if _is_first_of(nodes) and collectives.rank() != 0:
        lockable = [_can_be_taken(folder / lock)]
    taken: list[bool] = collectives.gather_objects(lockable)
    if any(taken):
        note(
            f"warning: {folder}: locks do not reach across nodes on this file system; make sure that no other run uses "
            "the folder"
        )


def _nodes_that_do_not_see(nodes: Nodes, folders: list[Path], seconds: float) -> list[list[str]]:
    """Write a file into each folder on rank 0 and look for it on the first rank of every node; return, for each folder,
    the hosts that do not find it within `seconds`."""
    token = collectives.on_first_rank(lambda: _write(folders), (OSError,), ConfigError)
    deadline = time.monotonic() + seconds
    sees = [not _is_first_of(nodes) or _appears(folder / token, token, deadline) for folder in folders]
    found = collectives.gather_objects([(_own(nodes).host, sees)])
    if collectives.rank() == 0:
        for folder in folders:
            (folder / token).unlink(missing_ok=True)
    return [[host for host, seen in found if not seen[number]] for number in range(len(folders))]


def _write(folders: list[Path]) -> str:
    token = f".preflight-{os.getpid()}-{time.time_ns()}"
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / token).write_text(token)
    return token


def _appears(path: Path, text: str, deadline: float) -> bool:
    while True:
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # makes a network file system ask its server again
            if path.read_text() == text:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def _can_be_taken(path: Path) -> bool:
    try:
        lock = FileLock(path)
    except OSError:
        return False
    try:
        return lock.take() and lock.unsupported is None
    finally:
        lock.close()


def _own(nodes: Nodes) -> Facts:
    return nodes.ranks[collectives.rank()]


def _is_first_of(nodes: Nodes) -> bool:
    return any(each.rank == collectives.rank() for each in nodes.firsts)


def _shared_artifacts(config: RunConfig, nodes: Nodes, note: Callable[[str], None]) -> RunConfig:
    """Say where prepared data and artifacts lie; move the store into the run folder where nodes do not share it."""
    prepared, folder = prepared_folder(config), artifact_folder(config)
    blind, blind_to_artifacts = _nodes_that_do_not_see(nodes, [prepared, folder], SECONDS_FOR_A_CACHE)
    once = "once per node" if blind else "once, for all nodes"
    note(f"prepared data  {prepared}, {once}")
    if not blind_to_artifacts:
        note(f"artifacts      {folder}, once for all nodes")
        return config
    own = Path(config.output) / ARTIFACTS
    note(f"artifacts      {own}, since {folder} is another one on every node; artifacts.folder names a shared one")
    return config.model_copy(update={"artifacts": ArtifactsConfig(folder=str(own))})


# -------------------------------------------------------------------------------------------------------------- network


def all_reduce_rate() -> tuple[float, float]:
    """Return the seconds of an all-reduce of 64 MiB, and its bus bandwidth in bytes per second and rank.

    In a ring each rank sends and receives 2 (n - 1) / n of the message; this rate compares with that of the network.
    """
    values = torch.zeros(MESSAGE_BYTES // 4, device=collectives.device())
    seconds = []
    for _ in range(2):  # the first opens connections
        collectives.barrier()
        began = time.perf_counter()
        dist.all_reduce(values)
        if values.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    slowest = max(collectives.gather_objects([seconds[-1]]))
    ranks = collectives.world_size()
    return slowest, 2 * (ranks - 1) / ranks * MESSAGE_BYTES / slowest
