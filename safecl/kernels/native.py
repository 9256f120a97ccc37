"""Find and load the C++ library, which needs no torch headers: one build serves every torch and Python.

setup.py builds `libsafecl.so` from `csrc/` into the folder of this file. If it is absent (no compiler at install time)
or older than the sources of a checkout, `missing()` says so and the torch twins are used. This file imports only the
standard library, because setup.py loads it too.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_uint32, c_void_p
from functools import lru_cache
from pathlib import Path

LIBRARY = Path(__file__).with_name("libsafecl.so")
SOURCES = Path(__file__).resolve().parents[2] / "csrc"  # in a checkout; an installed package has none
REBUILD = "pip install -e . (or python setup.py build_ext --inplace) with g++ on the PATH builds it"


class Buffer(ctypes.Structure):
    """The struct of this name in csrc/flat.h, which the structs up to Sums mirror field by field."""

    _fields_ = [("data", c_void_p), ("is_bf16", c_int64)]


class Segments(ctypes.Structure):
    _fields_ = [("count", c_int64), ("offsets", c_void_p), ("strength", c_void_p), ("weight_decay", c_void_p)]


class PenaltyCall(ctypes.Structure):
    _fields_ = [
        ("numel", c_int64),
        *((name, Buffer) for name in ("grad", "param", "anchor", "fisher")),
        ("segments", Segments),
        ("strength", c_float),
        ("grad_mult", c_float),
    ]


class AdamWCall(ctypes.Structure):
    _fields_ = [
        ("numel", c_int64),
        *((name, Buffer) for name in ("grad", "anchor", "fisher")),
        *((name, c_void_p) for name in ("param", "exp_avg", "exp_avg_sq", "ema", "param_out")),
        ("segments", Segments),
        *((name, c_int64) for name in ("proximal", "ema_by_fisher")),
        *(
            (name, c_float)
            for name in ("grad_mult", "lr", "step_size", "inv_sqrt_correction2", "weight_decay", "strength")
        ),
        *((name, c_float) for name in ("ema_rate", "ema_threshold", "ema_rate_above")),
        *((name, c_float) for name in ("beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "eps")),
    ]


class EmaCall(ctypes.Structure):
    _fields_ = [("numel", c_int64), ("ema", Buffer), ("param", Buffer), ("rate", c_float), ("seed", c_uint32 * 2)]


class FisherCall(ctypes.Structure):
    _fields_ = [("numel", c_int64), ("fisher", Buffer), ("grad", Buffer), ("weight", c_float)]


class Sums(ctypes.Structure):
    _fields_ = [("penalty", c_double), ("square", c_double), ("nonfinite", c_int64)]


class BracketCall(ctypes.Structure):
    """The struct of this name in csrc/ties.h, as the two below."""

    _fields_ = [
        ("numel", c_int64),
        *((name, c_void_p) for name in ("values", "minus")),
        *((name, c_int32) for name in ("low", "high")),
        ("between", c_void_p),
        *((name, c_int64) for name in ("capacity", "num_above", "num_high", "num_between", "num_low")),
    ]


class TaskVector(ctypes.Structure):
    _fields_ = [("values", c_void_p), ("weight", c_float), ("threshold", c_int32), ("num_equal", c_int64)]


class ElectionCall(ctypes.Structure):
    _fields_ = [
        ("numel", c_int64),
        ("target", c_void_p),
        ("vectors", POINTER(TaskVector)),
        *((name, c_int64) for name in ("num_vectors", "subtract", "normalize")),
        ("half_scale", c_float),
    ]


_SIGNATURES = {
    "safecl_source_hash": (c_char_p, []),
    "safecl_instruction_set": (c_char_p, []),
    "safecl_use_instruction_set": (c_int, [c_char_p]),
    "safecl_use_threads": (None, [c_int]),
    "safecl_use_openmp": (c_int, [c_int]),
    "safecl_adamw": (None, [POINTER(AdamWCall), POINTER(Sums)]),
    "safecl_fisher_penalty": (c_double, [POINTER(PenaltyCall)]),
    "safecl_penalized_grad_norm": (None, [POINTER(PenaltyCall), POINTER(Sums)]),
    "safecl_ema": (None, [POINTER(EmaCall)]),
    "safecl_fisher_accumulate": (None, [POINTER(FisherCall)]),
    "safecl_bracket": (None, [POINTER(BracketCall)]),
    "safecl_elect": (None, [POINTER(ElectionCall)]),
}


def source_hash(folder: Path = SOURCES) -> str:
    """Return 16 hex digits of the hash over the names and contents of the C++ sources."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".h", ".cpp", ".inc")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def missing() -> str:
    """Return why the library cannot be used, or "" if it can."""
    return _load()[1]


def library() -> ctypes.CDLL:
    """Return the loaded library with this process's number of threads; RuntimeError unless `missing()` is empty."""
    lib, reason = _load()
    if lib is None:
        raise RuntimeError(reason)
    lib.safecl_use_threads(num_threads())
    if _forked:
        lib.safecl_use_openmp(0)
    return lib


def instruction_set() -> str:
    """Return the instruction set that the kernels use: "avx512", "avx2" or "baseline"."""
    name: bytes = library().safecl_instruction_set()
    return name.decode()


_forked = False


def _mark_forked() -> None:
    """Remember a fork that happened before the library was loaded; once loaded, the library notices forks itself."""
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_mark_forked)


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str]:
    if not LIBRARY.exists():
        return None, f"the C++ library is not built; {REBUILD}"
    try:
        lib = open_library(LIBRARY)
    except (OSError, AttributeError) as error:
        return None, f"the C++ library does not load ({error}); {REBUILD}"
    in_checkout = (SOURCES / "flat.cpp").is_file() and (SOURCES.parent / "setup.py").is_file()
    if in_checkout and lib.safecl_source_hash().decode() != source_hash():
        return None, f"the C++ library is older than csrc/; {REBUILD}"
    return lib, ""


def open_library(path: Path) -> ctypes.CDLL:
    """Load a build of the library and declare its functions, which release the GIL."""
    lib = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def num_threads() -> int:
    """Return the threads of one call: SAFECL_NUM_THREADS, or torch's number up to this rank's share of the cores.

    torchrun sets OMP_NUM_THREADS=1 if the user has not set it. One thread would make an offloaded optimizer slow, so
    this 1 counts as unset.
    """
    wish = os.environ.get("SAFECL_NUM_THREADS", "")
    if wish.isdigit() and int(wish) > 0:
        return int(wish)
    share = max(1, len(os.sched_getaffinity(0)) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
        return share
    import torch

    return min(torch.get_num_threads(), share)
