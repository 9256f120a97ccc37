"""Without a GPU, large blocks of host memory go back to the system when they are freed."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys
from safecl.distributed.host_memory import give_back_large_blocks
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
if sys.argv[1] == "with":
    give_back_large_blocks()
libc.free(libc.malloc(24 * 2**20))  # glibc now takes blocks up to this size from its heap
block = libc.malloc(8 * 2**20)
heap = next(line for line in open("/proc/self/maps") if "[heap]" in line).split()[0]
first, last = (int(end, 16) for end in heap.split("-"))
print("heap" if first <= block < last else "mapped")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library is another one")
@pytest.mark.parametrize(("call", "place"), [("with", "mapped"), ("without", "heap")])
def test_a_large_block_is_no_part_of_the_heap(call, place):
    run = subprocess.run([sys.executable, "-c", PROGRAM, call], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == place
