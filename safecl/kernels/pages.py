"""Huge pages for the long-lived tensors that the optimizer's pass streams through host memory.

The pass reads and writes up to twelve streams side by side. In pages of 4 KiB each of them comes to a new page every
1,024 fp32 values, and a virtual machine looks each page up through two tables; in pages of 2 MiB that cost is gone.
Linux gives them to programs that ask (`madvise`, the usual setting of /sys/kernel/mm/transparent_hugepage/enabled).
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
# Smaller tensors may lie in a heap that others share, where whole pages would be held for their neighbours too.
SMALLEST_BYTES = 32 * 2**20
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # linux/mman.h; the second since Linux 6.1


def use_huge_pages(tensor: torch.Tensor | None) -> None:
    """Moves a tensor's memory into huge pages as far as it fills them; its values and its address stay. Does nothing
    for small tensors, for those of a GPU or page-locked for one, and where the system offers no huge pages."""
    size = page_bytes()
    if (
        not size
        or tensor is None
        or tensor.device.type != "cpu"
        or tensor.nbytes < SMALLEST_BYTES
        or torch.cuda.is_available()
    ):
        return
    begin = -(-tensor.data_ptr() // size) * size
    length = (tensor.data_ptr() + tensor.nbytes - begin) // size * size
    for advice in (
        MADV_HUGEPAGE,
        MADV_COLLAPSE,
    ):  # an older kernel takes the first alone: what is written from now on, the rest in time
        _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), advice)


@functools.lru_cache(1)
def page_bytes() -> int:
    """Size of a huge page; 0 where there are none or the system's owner has switched them off."""
    try:
        return 0 if "[never]" in (SETTINGS / "enabled").read_text() else int((SETTINGS / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0


@functools.lru_cache(1)
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
