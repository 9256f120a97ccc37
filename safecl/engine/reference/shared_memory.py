"""A segment of host memory that the ranks of a node share, and that disappears after any exit. Imports no torch.

It is a memfd: memory with a file descriptor and no name. It takes no room in /dev/shm (64 MB in many containers), a
later start cannot find it, and the kernel frees it with the last process that maps it, killed or not. Other ranks open
it through /proc/<pid>/fd/<number>.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path

from safecl.storage.sizes import available_memory, format_bytes, free_bytes

_FALLBACK = Path("/dev/shm")
_MBIND = {"x86_64": 237, "aarch64": 235}
"""Number of the system call, for which Python and the C library have no function."""
_INTERLEAVE = 3  # MPOL_INTERLEAVE


class NoRoom(OSError):
    """The segment does not fit; the message has the bytes that are needed and that are free."""


def create(nbytes: int, label: str) -> int:
    """Make a segment of `nbytes` zeros and return its file descriptor. Raises NoRoom."""
    if (free := available_memory()) is not None and nbytes > free:
        raise NoRoom(f"{label} needs {format_bytes(nbytes)} of host memory, {format_bytes(free)} are available")
    try:
        handle = os.memfd_create(label, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except (AttributeError, OSError):  # an old kernel, or a sandbox that forbids it
        handle = _without_memfd(nbytes, label)
    os.ftruncate(handle, nbytes)
    return handle


def _without_memfd(nbytes: int, label: str) -> int:
    """Make a file in /dev/shm and remove its name at once."""
    if nbytes > (free := free_bytes(_FALLBACK)):
        raise NoRoom(
            f"{label} needs {format_bytes(nbytes)} in {_FALLBACK}, {format_bytes(free)} are free there; "
            "give the container more (docker: --shm-size, Kubernetes: an emptyDir of medium Memory)"
        )
    handle, name = tempfile.mkstemp(prefix="safecl-", dir=_FALLBACK)
    os.unlink(name)
    return handle


def address(handle: int) -> str:
    """The path by which the node's other ranks open the segment, while `handle` is open here."""
    return f"/proc/{os.getpid()}/fd/{handle}"


def map_segment(handle: int, nbytes: int, writable: bool = False) -> mmap.mmap:
    """Map the segment into this process's memory, shared with all others that map it. The handle may be closed then."""
    return mmap.mmap(handle, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))


def numa_nodes(listed: Path = Path("/sys/devices/system/node/has_memory")) -> list[int]:
    """Return the numbers of the machine's NUMA nodes that have memory; empty where the system does not say."""
    try:
        spans = [span.split("-") for span in listed.read_text().strip().split(",") if span]
    except OSError:
        return []
    return [node for span in spans for node in range(int(span[0]), int(span[-1]) + 1)]


def interleave(memory: mmap.mmap, nodes: Sequence[int]) -> bool:
    """Let the pages of a new, writable mapping come from these NUMA nodes in turn; return False where the system
    refuses, which only costs time.

    Else they all come from the node of the thread that writes them first, and the GPUs of every other node read them
    across the machine. The rule belongs to the segment: it holds for all processes that map it.
    """
    number = _MBIND.get(platform.machine())
    if number is None or not nodes:
        return False
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    mask = (ctypes.c_ulong * (max(nodes) // bits + 1))()
    for node in nodes:
        mask[node // bits] |= 1 << node % bits
    start = ctypes.c_char.from_buffer(memory)
    call = [ctypes.c_long(number), ctypes.byref(start), ctypes.c_ulong(len(memory)), ctypes.c_int(_INTERLEAVE)]
    refused = ctypes.CDLL(None).syscall(*call, mask, ctypes.c_ulong(len(mask) * bits + 1), ctypes.c_uint(0))
    return not refused


def seal(handle: int) -> None:
    """Forbid all changes of the segment. No writable mapping may be left. Does nothing where the kernel has no seals:
    mappings are read-only there."""
    with contextlib.suppress(AttributeError, OSError):
        fcntl.fcntl(handle, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
