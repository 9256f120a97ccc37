"""The environment of a process that torchrun, the deepspeed launcher, or a user with plain `safecl` has started.

DeepSpeed needs RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT even for one process; launchers set them, a
user does not. Imports no torch.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from safecl.config import ConfigError

LAUNCHED = "SAFECL_LAUNCHED"
"""Set by spawn.py for the ranks that it starts. torchrun sets TORCHELASTIC_RUN_ID, DeepSpeed's launcher CROSS_SIZE."""
settled: set[str] = set()
"""Names of the variables that `settle_environment` has set: they are not the user's."""

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


_OF_A_LAUNCHER = (*VARIABLES, "LOCAL_WORLD_SIZE", "GROUP_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", LAUNCHED)


def without_launcher(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables for a new process that is no rank of this job: those of a launcher are left out."""
    return {
        name: value
        for name, value in environ.items()
        if name not in _OF_A_LAUNCHER and not name.startswith("TORCHELASTIC_")
    }


def rank() -> int:
    """This process's rank in the whole job; 0 without a launcher."""
    return int(os.environ.get("RANK", "0") or 0)


def local_rank() -> int:
    """This process's rank on its host; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0") or 0)


def master_address() -> str:
    """The address of rank 0's host, which other hosts can reach; this host without a launcher."""
    return os.environ.get("MASTER_ADDR") or "127.0.0.1"


def free_port() -> int:
    """Find a TCP port of this machine that nothing listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def join_launcher(environ: MutableMapping[str, str] = os.environ) -> None:
    """Keep a launcher's variables; without a launcher set those of a single process. Raises ConfigError where a part of
    them is missing."""
    if "RANK" not in environ and int(environ.get("WORLD_SIZE") or 1) == 1:
        single = {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        environ.update(single)
        return
    if missing := [name for name in VARIABLES if not environ.get(name)]:
        there = ", ".join(f"{name}={environ[name]}" for name in VARIABLES if environ.get(name))
        raise ConfigError(
            f"environment: {there} is set, but {', '.join(missing)} is not; start several processes with "
            "`torchrun --nproc-per-node N -m safecl train CFG`, or unset these variables for one process"
        )


def launcher() -> int | None:
    """The process of the launcher that started this one and should outlive it; None for one that a user, or a script
    that may end, has started."""
    is_launched = any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "CROSS_SIZE", LAUNCHED))
    return os.getppid() if is_launched else None


def launcher_keeps_store() -> bool:
    """Whether torchrun's own process, and not rank 0, holds the store through which the ranks find each other."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def settle_environment(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set variables for libraries, before they are imported: there is no GPU (DeepSpeed would warn), or no terminal for
    progress bars."""
    wanted = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # C++ stacks of every connection that a killed rank leaves
    if not sys.stderr.isatty():
        wanted["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        wanted["DS_ACCELERATOR"] = "cpu"
    settled.update(wanted.keys() - environ.keys())
    environ.update({name: value for name, value in wanted.items() if name not in environ})


def without_launcher_arguments(arguments: list[str]) -> list[str]:
    """Drop `--local_rank=N`, which the deepspeed launcher adds; LOCAL_RANK has the same value."""
    return [a for a in arguments if not a.startswith(("--local_rank=", "--local-rank="))]
