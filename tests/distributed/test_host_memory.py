"""Without a GPU, freed host memory is kept or given back, as a run has room."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library is another one")

START = """
import ctypes, sys
from safecl.distributed import host_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
for name in sys.argv[1].split():
    getattr(host_memory, name)()
"""
PLACE = """
libc.free(libc.malloc(24 * 2**20))  # glibc now takes blocks up to this size from its heap
block = libc.malloc(8 * 2**20)
heap = next(line for line in open("/proc/self/maps") if "[heap]" in line).split()[0]
first, last = (int(end, 16) for end in heap.split("-"))
print("heap" if first <= block < last else "mapped")
"""
FAULTS = """
import resource
def use():
    block = libc.malloc(64 * 2**20)
    ctypes.memset(block, 1, 64 * 2**20)
    libc.free(block)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def printed(program: str, call: str, **environment: str) -> str:
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | environment
    run = subprocess.run([sys.executable, "-c", START + program, call], capture_output=True, text=True, env=own)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.parametrize(
    ("call", "place"),
    [
        ("give_back_large_blocks", "mapped"),
        ("", "heap"),
        ("keep_freed_blocks", "heap"),
        ("keep_freed_blocks give_back_large_blocks", "mapped"),
    ],
)
def test_a_large_block_is_no_part_of_the_heap(call, place):
    assert printed(PLACE, call) == place


def test_a_kept_block_is_used_again_with_its_pages():
    pages = 64 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert int(printed(FAULTS, "keep_freed_blocks")) < pages // 100
    assert int(printed(FAULTS, "give_back_large_blocks")) >= pages


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_MMAP_THRESHOLD_", str(2**25)), ("GLIBC_TUNABLES", f"glibc.malloc.mmap_threshold={2**25}")],
)
def test_a_setting_of_the_environment_is_left_alone(name, value):
    assert printed(PLACE, "give_back_large_blocks", **{name: value}) == "heap"
