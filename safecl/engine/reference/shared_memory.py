"""A segment of host memory that a node's ranks share and that no exit leaves behind. Imports no torch.

It is a memfd: memory with a file descriptor and no name, so that neither /dev/shm (64 MB in many containers) nor a
later start sees it, and the kernel frees it with the last process that maps it, killed or not. Other ranks open it
through /proc/<pid>/fd/<number>.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import tempfile
from pathlib import Path

from safecl.engine.checkpoint.folder import format_bytes

_FALLBACK = Path("/dev/shm")


class NoRoom(OSError):
    """The segment does not fit; the message says how much is needed and how much there is."""


def create(nbytes: int, label: str) -> int:
    """A file descriptor of a new segment of `nbytes` zeros. Raises NoRoom."""
    if (free := available_memory()) is not None and nbytes > free:
        raise NoRoom(f"{label} needs {format_bytes(nbytes)} of host memory, {format_bytes(free)} are available")
    try:
        handle = os.memfd_create(label, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except (AttributeError, OSError):  # an old kernel, or a sandbox that forbids it
        handle = _without_memfd(nbytes, label)
    os.ftruncate(handle, nbytes)
    return handle


def _without_memfd(nbytes: int, label: str) -> int:
    """A file in /dev/shm that has lost its name already."""
    free = os.statvfs(_FALLBACK)
    if nbytes > free.f_bavail * free.f_frsize:
        raise NoRoom(
            f"{label} needs {format_bytes(nbytes)} in {_FALLBACK}, {format_bytes(free.f_bavail * free.f_frsize)} are free there; "
            "give the container more (docker: --shm-size, Kubernetes: an emptyDir of medium Memory)"
        )
    handle, name = tempfile.mkstemp(prefix="safecl-", dir=_FALLBACK)
    os.unlink(name)
    return handle


def address(handle: int) -> str:
    """Where the node's other ranks find the segment as long as `handle` is open here."""
    return f"/proc/{os.getpid()}/fd/{handle}"


def map_segment(handle: int, nbytes: int, writable: bool = False) -> mmap.mmap:
    """The segment in this process's memory, shared with all others that map it. The handle may be closed afterwards."""
    return mmap.mmap(handle, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))


def seal(handle: int) -> None:
    """From now on nobody can change the segment; no writable mapping may be left. Mappings are read-only where the
    kernel cannot."""
    with contextlib.suppress(AttributeError, OSError):
        fcntl.fcntl(handle, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)


def available_memory() -> int | None:
    """Bytes that this process and its node may still use: the machine's, and the container's limit; None where nobody
    knows."""
    known = [value for value in (_machine_available(), _group_available()) if value is not None]
    return min(known, default=None)


def _machine_available() -> int | None:
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    return None


def _group_available(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the control group leaves; the page cache that it counts can be dropped and is not in use."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        limit = int((root / "memory.max").read_text())
        cache = next(
            line for line in (root / "memory.stat").read_text().splitlines() if line.startswith("inactive_file ")
        )
        return max(0, limit - int((root / "memory.current").read_text()) + int(cache.split()[1]))
    return None
