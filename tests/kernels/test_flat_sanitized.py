"""The C++ kernels under the address and undefined-behaviour sanitizers: every kernel, many sizes, all instruction
sets."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SANITIZE = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
OPTIONS = "detect_leaks=0:alloc_dealloc_mismatch=0:detect_odr_violation=0"


def runtime(name: str) -> str:
    """The sanitizer's own library, which must be loaded first."""
    found = subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=False
    ).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"this compiler has no {name}")
    return found


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    spec = importlib.util.spec_from_file_location("setup_of_safecl", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    target = tmp_path_factory.mktemp("sanitized") / "libsafecl.so"
    flags = tuple(flag for flag in setup.FLAGS if flag != "-O3")
    assert setup.compile_library(target, (*flags, *SANITIZE)) == ""
    return target


def run(library: Path, *what: str) -> subprocess.CompletedProcess:
    preloaded = " ".join(runtime(name) for name in ("libasan.so", "libubsan.so"))
    environment = os.environ | {"LD_PRELOAD": preloaded, "ASAN_OPTIONS": OPTIONS, "OMP_NUM_THREADS": "3"}
    command = [sys.executable, "-m", "tests.kernels.sanitized", str(library), *what]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_no_kernel_leaves_its_memory_or_does_what_cpp_leaves_open(library):
    done = run(library)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "clean: baseline" in done.stdout and "runtime error" not in done.stderr


@pytest.mark.long
def test_the_sanitizer_notices_a_kernel_that_leaves_its_memory(library):
    done = run(library, "overrun")
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr
