"""Numbers of bytes: as people read them, and how many are free; freed memory goes back. Imports no torch."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import shutil
from pathlib import Path

from safecl.storage.control_groups import tightest_group


def format_bytes(count: float) -> str:
    """1234567 -> "1.2 MB"."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.0f} bytes" if units[0] == "bytes" else f"{count:.1f} {units[0]}"


def free_bytes(path: Path) -> int:
    """Free bytes on the disk that holds `path`, or would hold it if it were made."""
    path = path.absolute()
    nearest = next(parent for parent in (path, *path.parents) if parent.exists())
    return shutil.disk_usage(nearest).free


def resident_bytes() -> int:
    """Bytes of host memory that this process holds now, its libraries' files included; 0 if unknown."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmRSS:")).split()[1])
    return 0


def available_memory() -> int | None:
    """Bytes of host memory that can still be used, by the machine's count and by the container's limit; None if
    unknown."""
    group = tightest_group()
    known = [_machine_available(), group.left if group is not None else None, _address_space()]
    return min((value for value in known if value is not None), default=None)


def _address_space() -> int | None:
    """Bytes that `ulimit -v` still leaves to this process; None without such a limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    with contextlib.suppress(OSError, ValueError):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        return max(0, limit - used)
    return limit


def memory_text() -> str:
    """Say how much host memory is available, and which limits there are."""
    limits, free = memory_limits(), available_memory()
    told = f"{format_bytes(free)} are available" if free is not None else "it is unknown how much is available"
    return f"{told} ({'; '.join(limits)})" if limits else told


def memory_limits() -> list[str]:
    """Name the limits that this process has beside the machine's memory."""
    limits = []
    if (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        limits.append(f"ulimit -v allows {format_bytes(limit)}")
    if (group := tightest_group()) is not None:
        limits.append(f"the control group allows {format_bytes(group.limit)}")
    return limits


def _machine_available() -> int | None:
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    return None


def give_back_freed_memory() -> None:
    """Return freed memory to the system.

    glibc keeps freed buffers of some MB, and takes new memory for the next ones while anything small lies between them.
    """
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
