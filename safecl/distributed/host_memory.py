"""Freed host memory, which the C library keeps or gives back, for runs whose device is the CPU."""

from __future__ import annotations

import contextlib
import ctypes
import os

LARGE_BYTES = 2**20
"""Blocks from this size on are given back to the system when they are freed."""
SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
"""Variables of glibc that a user may have set. Then nothing is changed here."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h of glibc


def keep_freed_blocks() -> None:
    """Make malloc keep what is freed, so that the next pass takes the same pages again.

    Otherwise each pass gets its activations as new pages, which the system finds and clears one by one. More memory is
    held, since later blocks do not fit all the gaps (safecl.planning.costs.device_memory.KEPT_SHARE). Does nothing with
    another C library, or where the environment has one of SETTINGS.
    """
    _set({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1})  # no block is mapped by itself, and the heap does not shrink


def give_back_large_blocks() -> None:
    """Make malloc give every large block back to the system as soon as it is freed.

    glibc raises its limit for this to 32 MiB by itself, and then keeps the activations of a pass in a heap that later
    passes cannot fill: with a model of 135 M weights, 0.7 GB of 5.2. Does nothing with another C library, or where the
    environment has a setting of its own.
    """
    _set({_M_MMAP_MAX: 2**16, _M_MMAP_THRESHOLD: LARGE_BYTES, _M_TRIM_THRESHOLD: LARGE_BYTES})


def _set(options: dict[int, int]) -> None:
    if any(name in os.environ for name in SETTINGS) or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for option, value in options.items():
            libc.mallopt(option, value)
