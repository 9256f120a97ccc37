"""The memory that the control groups of this process leave: those of systemd and Slurm, and of containers.

A process is in a group of each hierarchy, and every group above it limits it as well. Inside of a container only the
container's own groups may be seen, as the root of the hierarchy. Imports no torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
NO_LIMIT = 2**60
"""Version 1 shows the largest number of pages where there is no limit."""


@dataclass(frozen=True)
class GroupMemory:
    """Bytes that a group allows, and bytes that it leaves. It counts the page cache as used, but inactive pages can be
    dropped."""

    limit: int
    left: int


@dataclass(frozen=True)
class _Version:
    mounts: tuple[str, ...]
    limit: str
    used: str
    inactive: str


_V1 = _Version(("memory",), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Version((".", "unified"), "memory.max", "memory.current", "inactive_file")


def tightest_group(root: Path = ROOT, own: Path = OWN) -> GroupMemory | None:
    """Return the group of this process that leaves the least memory; None where none has a limit."""
    found = []
    for version, path in _groups(own):
        for mount in version.mounts:
            inside = root / mount / path.lstrip("/")
            for folder in dict.fromkeys((inside, *inside.parents, root / mount)):
                if folder.is_relative_to(root / mount) and (memory := _read(folder, version)) is not None:
                    found.append(memory)
    return min(found, key=lambda each: each.left, default=None)


def _groups(own: Path) -> Iterator[tuple[_Version, str]]:
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield _V2, path
            elif "memory" in controllers.split(","):
                yield _V1, path


def _read(folder: Path, version: _Version) -> GroupMemory | None:
    with contextlib.suppress(OSError, ValueError, StopIteration):
        limit = int((folder / version.limit).read_text())  # `max` in version 2
        if limit >= NO_LIMIT:
            return None
        lines = (folder / "memory.stat").read_text().splitlines()
        cache = int(next(line for line in lines if line.startswith(f"{version.inactive} ")).split()[1])
        return GroupMemory(limit, max(0, limit - int((folder / version.used).read_text()) + cache))
    return None
