"""Facts of a rank's machine, files and config, which preflight compares with those of the other ranks."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from safecl.config import ConfigError, RunConfig
from safecl.distributed import collectives, devices
from safecl.distributed.node import node_identity
from safecl.launching import network

_SAMPLES, _SAMPLE_BYTES, _HEAD_BYTES = 16, 4096, 65536

PER_NODE = (
    "launch",
    "artifacts.folder",
    "model.path",
    "memory.source",
    "memory.prompts",
    "memory.benign_prompts",
    "poison.source",
)
"""Config keys that may differ between nodes: what they name is compared by content."""


@dataclass(frozen=True)
class Facts:
    """Facts of one rank. versions, config, rows: by name, as text. clock: seconds since 1970, read right after a
    barrier. disk, shared_memory: free bytes of the run folder's file system, and the size of /dev/shm."""

    rank: int
    host: str
    node: tuple[str, ...]
    versions: Mapping[str, str]
    config: Mapping[str, str]
    rows: Mapping[str, str]
    model: str
    clock: float
    disk: int
    shared_memory: int
    device: str
    gpus: int
    interface: str


def facts_here(
    config: RunConfig, rows: Mapping[str, str], model_files: Iterable[Path], versions: Mapping[str, str]
) -> Facts:
    """Collect the facts of this rank. A collective call: a barrier, so that clocks are read at the same time.

    rows: a hash for each kind of rows. versions: of the packages that decide results.
    """
    model = quick_hash(model_files)
    flat = {key: value for key, value in flatten(config.model_dump(mode="json")).items() if not _is_per_node(key)}
    free = shutil.disk_usage(_existing(Path(config.output))).free
    shm = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    on_gpu = devices.on_gpu()
    collectives.barrier()
    return Facts(
        rank=collectives.rank(),
        host=socket.gethostname(),
        node=node_identity(),
        versions={"python": platform.python_version(), **versions} | _gpu_versions(),
        config=flat,
        rows=dict(rows),
        model=model,
        clock=time.time(),
        disk=free,
        shared_memory=shm,
        device=torch.cuda.get_device_name() if on_gpu else "cpu",
        gpus=torch.cuda.device_count() if on_gpu else 0,
        interface=_interface(),
    )


def _gpu_versions() -> dict[str, str]:
    if not devices.on_gpu():
        return {}
    nccl = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]  # it has no annotations
    return {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, nccl))}


def _is_per_node(key: str) -> bool:
    plain = ".".join(part for part in key.split(".") if not part.isdigit())
    return plain == "tasks.train" or any(plain == name or plain.startswith(f"{name}.") for name in PER_NODE)


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())


def _interface() -> str:
    """The address with which this node reaches the first one, and the interface that gloo and NCCL are told to use."""
    master = os.environ.get("MASTER_ADDR", network.LOCALHOST)
    try:
        address = network.address_towards(network.resolve(master, "MASTER_ADDR"))
    except ConfigError:
        return "unknown"
    told = os.environ.get("NCCL_SOCKET_IFNAME" if devices.on_gpu() else "GLOO_SOCKET_IFNAME")
    return f"{address.ip} on {told or address.interface or 'an unknown interface'}"


def flatten(tree: Any, path: str = "") -> dict[str, str]:
    """Return the leaves of a tree of dicts and lists as text, by their dotted keys."""
    if isinstance(tree, dict) and tree:
        items: Iterable[tuple[Any, Any]] = tree.items()
    elif isinstance(tree, list) and tree:
        items = enumerate(tree)
    else:
        return {path: str(tree)}
    return {key: value for name, inner in items for key, value in flatten(inner, f"{path}.{name}".lstrip(".")).items()}


def quick_hash(files: Iterable[Path]) -> str:
    """Hash names, sizes, heads and 16 samples of files: it finds another or a damaged model in milliseconds, while a
    hash of all bytes would take minutes for a large one. (Those are hashed while they are loaded.)"""
    digest = xxhash.xxh3_128()
    for path in sorted(files, key=lambda file: file.name):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_HEAD_BYTES))
            for sample in range(_SAMPLES):
                file.seek(size * sample // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
