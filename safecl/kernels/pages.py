"""Huge pages for the long-lived tensors in host memory that the optimizer's pass reads and writes.

The pass has up to twelve streams at once. With pages of 4 KiB each stream reaches a new page every 1,024 fp32 values,
and a virtual machine looks up each page through two tables. With pages of 2 MiB that cost is negligible. Linux gives
them to programs that ask (`madvise`, the usual setting of /sys/kernel/mm/transparent_hugepage/enabled).
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
# Smaller tensors may share a heap with others, whose memory would be in the same huge pages.
SMALLEST_BYTES = 32 * 2**20
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # linux/mman.h; the second since Linux 6.1


def use_huge_pages(tensor: torch.Tensor | None) -> None:
    """Move the part of a tensor's memory that fills whole huge pages into such pages; values and address stay.

    Does nothing for small tensors, for tensors on a GPU or page-locked for one, and where the system has no huge pages.
    """
    size = page_bytes()
    if (
        not size
        or tensor is None
        or tensor.device.type != "cpu"
        or tensor.nbytes < SMALLEST_BYTES
        or _is_page_locked(tensor)
    ):
        return
    begin = -(-tensor.data_ptr() // size) * size
    length = (tensor.data_ptr() + tensor.nbytes - begin) // size * size
    # Linux before 6.1 knows only the first: new pages are huge at once, existing ones become huge over time.
    for advice in (MADV_HUGEPAGE, MADV_COLLAPSE):
        _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), advice)


def _is_page_locked(tensor: torch.Tensor) -> bool:
    """Such pages cannot move. The question would start CUDA where it does not run yet."""
    return torch.cuda.is_initialized() and tensor.is_pinned()  # type: ignore[no-untyped-call]  # torch gives no types


@functools.lru_cache(1)
def page_bytes() -> int:
    """Return the size of a huge page; 0 if the system has none or they are switched off."""
    try:
        return 0 if "[never]" in (SETTINGS / "enabled").read_text() else int((SETTINGS / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0


@functools.lru_cache(1)
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
