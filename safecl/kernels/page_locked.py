"""Page-locked host memory of exactly the size that is asked for, which goes back to the system with its last tensor.

A GPU copies from and to page-locked memory at full speed and asynchronously. torch's own allocator (`pin_memory=True`)
rounds every allocation up to a power of two and keeps it for ever: 25 GiB take 32, and no other process gets them back.
Here memory is an anonymous mapping of whole pages, which CUDA registers. Where CUDA refuses (a limit on locked memory),
the memory is still usable, only slower; `refusals` says why.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
from collections.abc import Sequence
from typing import Any

import torch

from safecl.kernels.pages import SMALLEST_BYTES, page_bytes

_PORTABLE = 1  # cudaHostRegisterPortable: locked for all contexts of the process
_locked_now = 0
refusals: list[str] = []
"""Messages of failed registrations, in order."""


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return a page-locked tensor in host memory. New pages hold zeros, as the system gives them out.

    Needs a GPU. Its memory is unlocked and unmapped when the last tensor that views it is freed.
    """
    count = math.prod(shape)
    nbytes = count * dtype.itemsize
    if nbytes == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    memory = _Mapping(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= SMALLEST_BYTES and page_bytes():
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(memory, dtype=dtype, count=count)
    memory.lock(tensor.data_ptr())
    return tensor.view(tuple(shape))


zeros = empty
"""The same function: new pages hold zeros."""


def copy_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a page-locked copy of a tensor, with the shape that it has."""
    return empty(tensor.shape, tensor.dtype).copy_(tensor)


def locked_bytes() -> int:
    """Return the bytes of all tensors of this module that exist, in whole pages."""
    return _locked_now


class _Mapping(mmap.mmap):
    """An anonymous mapping that CUDA has registered."""

    address: int | None = None
    counted: int = 0

    def lock(self, address: int) -> None:
        global _locked_now
        self.counted = -(-len(self) // mmap.PAGESIZE) * mmap.PAGESIZE
        _locked_now += self.counted
        if (problem := register(address, len(self))) is None:
            self.address = address
        else:
            refusals.append(problem)

    def __del__(self) -> None:  # runs before the pages are unmapped
        global _locked_now
        _locked_now -= self.counted
        if self.address is not None:
            unregister(self.address)


def register(address: int, nbytes: int) -> str | None:
    """Register memory of this process with CUDA. Return None, or why CUDA refuses.

    A refused call leaves its error pending in CUDA, and the next kernel launch of anybody would raise it. So one is
    launched here, which takes the error away.
    """
    code = int(_cuda().cudaHostRegister(address, nbytes, _PORTABLE))
    if code == 0:
        return None
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
    return f"CUDA cannot lock {nbytes:,} bytes of host memory (error {code}); copies to and from them are slower"


def unregister(address: int) -> None:
    """Undo `register`, when all copies on the current device are done. Does nothing while the interpreter ends."""
    if sys.is_finalizing():
        return
    with contextlib.suppress(RuntimeError):
        torch.cuda.synchronize()
        _cuda().cudaHostUnregister(address)


def _cuda() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch gives it no types
