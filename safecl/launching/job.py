"""A job of `safecl launch`: what to train, on how many ranks, and the commands that start it. Imports no torch."""

from __future__ import annotations

import os
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from safecl.config import ConfigError, LaunchConfig, RunConfig

LOGS = "logs"
"""Folder of the ranks' logs in the run folder."""
FILES = "launch"
"""Folder of the files that were submitted, in the run folder."""


@dataclass(frozen=True)
class Job:
    """One run to be started. config: the file as the user named it. overrides: `key=value` texts. options: further
    arguments of `safecl train`. sweep: one list of overrides for each run of a sweep."""

    config: Path
    overrides: tuple[str, ...]
    options: tuple[str, ...]
    settings: LaunchConfig
    folder: Path
    sweep: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def of(cls, path: Path, arguments: list[str], config: RunConfig) -> Job:
        """Divide the arguments behind the config into overrides and options."""
        overrides = tuple(a for a in arguments if not a.startswith("-"))
        options = tuple(a for a in arguments if a.startswith("-"))
        return cls(path, overrides, options, config.launch, Path(config.output))

    @property
    def name(self) -> str:
        """The job's name: that of the run folder, in letters that every scheduler accepts."""
        return re.sub(r"[^a-z0-9]+", "-", self.folder.name.lower()).strip("-")[:40].strip("-") or "safecl"

    @property
    def training(self) -> list[str]:
        """The arguments of safecl that train: `train CFG KEY=VALUE ...`."""
        return ["train", str(self.config), *self.overrides, *self.options]

    @property
    def logs(self) -> Path:
        return self.folder / LOGS

    def ranks_per_node(self) -> int:
        """Return the number of ranks on each node. Raises ConfigError where it must be given."""
        wanted = self.settings.gpus_per_node
        if wanted != "auto":
            return wanted
        if self.settings.via in ("slurm", "kubernetes"):
            raise ConfigError(
                f"launch.gpus_per_node: auto counts the GPUs of this machine, but {self.settings.via} starts the ranks "
                "on others; give a number, such as --gpus-per-node 8"
            )
        return gpus_here() or 1


def gpus_here() -> int:
    """Return the number of NVIDIA GPUs that a process here sees, without a driver library."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    return len([found for found in Path("/dev").glob("nvidia*") if found.name[6:].isdigit()])


@dataclass(frozen=True)
class Command:
    """A command, and the environment variables that it gets beside those of this process."""

    argv: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)

    def line(self) -> str:
        """The command for a shell, which does the same."""
        assignments = [f"{name}={value}" for name, value in self.environment.items()]
        return shlex.join([*(["env", *assignments] if assignments else []), *self.argv])


@dataclass(frozen=True)
class Launch:
    """The command that starts a job.

    facts: (label, text) lines for people. files: to be written before the command runs. agent: the command starts ranks
    on this machine, so an agent must look after them. first_node: address of the first node, where it is another one.
    several: an agent on each of several nodes. ranks: number of ranks on this machine, where it is known.
    """

    facts: list[tuple[str, str]]
    command: Command
    files: dict[Path, str] = field(default_factory=dict)
    agent: bool = False
    first_node: tuple[str, int] | None = None
    several: bool = False
    ranks: int | None = None


def timeouts(settings: LaunchConfig) -> str:
    """The time limits of a launch, for people."""
    smallest, largest = settings.node_range
    parts = [f"{settings.start_timeout} s until all nodes are there"] if smallest == largest > 1 else []
    if smallest != largest:
        parts = [f"{settings.start_timeout} s until {smallest} is there, {settings.last_call} s more for others"]
    return ", ".join([*parts, f"{settings.stop_timeout} s to save after a signal"])


def python() -> str:
    return sys.executable or "python3"
