"""Runs every C++ kernel in a library that was compiled with sanitizers: `python -m tests.kernels.sanitized LIBRARY`.

With `overrun` as a second argument a kernel is told of more elements than there are, which the sanitizer must notice.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

from safecl.kernels import native

SIZES = (3, 15, 16, 17, 33, 65, 1000, 4099, 40_001)


def main(library: str, *what: str) -> None:
    native.LIBRARY = Path(library)
    assert not native.missing(), native.missing()
    if what == ("overrun",):
        overrun()
        return
    from tests.kernels import ties_suite
    from tests.kernels.test_flat_cpp import all_results

    lib = native.library()
    for name in ("baseline", "avx2", "avx512"):
        if lib.safecl_use_instruction_set(name.encode()):
            for threads in (1, 3):
                lib.safecl_use_threads(threads)
                for size in SIZES:
                    all_results(size)
                    ties_suite.all_results(size)
            print("clean:", name)


def overrun() -> None:
    fisher, grad = torch.zeros(40), torch.zeros(40)
    buffers = [native.Buffer(each.data_ptr(), 0) for each in (fisher, grad)]
    native.library().safecl_fisher_accumulate(ctypes.byref(native.FisherCall(4000, *buffers, 1.0)))


if __name__ == "__main__":
    main(*sys.argv[1:])
