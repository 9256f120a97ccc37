"""The environment variables of the ranks: those that safecl sets, those of the config, and those of the user."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from safecl.config import LaunchConfig
from safecl.distributed import rank_files
from safecl.distributed.environment import settled
from safecl.launching.network import Address

SHOWN = ("NCCL_", "GLOO_", "TORCH_", "CUDA_", "OMP_", "DS_", "HF_", "SAFECL_", "UCX_", "FI_")
"""Prefixes of variables that change how ranks start or talk to each other."""
_SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")


@dataclass(frozen=True)
class Variables:
    """ours: set by safecl, where the user has not set them. configured: launch.environment. theirs: of the user's
    environment, kept."""

    ours: dict[str, str]
    configured: dict[str, str]
    theirs: dict[str, str]

    def to_set(self) -> dict[str, str]:
        """Return the variables that the command must set."""
        return self.ours | self.configured

    def for_other_nodes(self) -> dict[str, str]:
        """Return the variables that ranks on other nodes get by a command line, which other users of the machine see:
        also those of the user's environment that are no secrets."""
        theirs = {name: value for name, value in self.theirs.items() if not _is_secret(name)}
        return theirs | self.to_set()

    def facts(self, *, travels: bool = True) -> list[tuple[str, str]]:
        """Return (label, text) lines that say who sets what. travels: the ranks get the user's environment."""
        lines = [("set by safecl", _joined(self.ours)), ("by the config", _joined(self.configured))]
        replaced = {name: value for name, value in self.theirs.items() if name in self.configured}
        kept = {name: value for name, value in self.theirs.items() if name not in self.configured}
        lines += [
            ("yours, kept" if travels else "yours, left here", _joined(kept)),
            ("yours, replaced", _joined(replaced)),
        ]
        return [(label, text) for label, text in lines if text]


def variables_of(settings: LaunchConfig, wanted: Mapping[str, str]) -> Variables:
    """Sort out who sets what. wanted: the variables that safecl would set."""
    environ = os.environ
    theirs = {name: value for name, value in sorted(environ.items()) if name.startswith(SHOWN) and name not in settled}
    ours = {name: value for name, value in wanted.items() if name not in environ and name not in settings.environment}
    # The folders of the agent belong to this launch, whatever a surrounding launch has set.
    ours |= {name: wanted[name] for name in (rank_files.FILES, rank_files.LOGS) if name in wanted}
    theirs = {name: value for name, value in theirs.items() if name not in ours}
    return Variables(ours, dict(settings.environment), theirs)


def network_variables(address: Address) -> dict[str, str]:
    """Return the variables that make gloo and NCCL use an interface. Without them each chooses one by itself."""
    if address.interface is None:
        return {}
    return {"GLOO_SOCKET_IFNAME": address.interface, "NCCL_SOCKET_IFNAME": address.interface}


def threads_of(ranks: int) -> dict[str, str]:
    """Return each rank's share of the cores; torchrun would give every rank one."""
    return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks))}


def _joined(variables: Mapping[str, str]) -> str:
    return " ".join(f"{name}={'(hidden)' if _is_secret(name) else value}" for name, value in variables.items())


def _is_secret(name: str) -> bool:
    return any(part in name for part in _SECRET)
