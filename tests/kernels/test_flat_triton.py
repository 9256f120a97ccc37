"""The Triton kernels without a GPU: through the interpreter, and compiled ahead of time for the GPUs they are for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from safecl.kernels.flat import triton_kernels
from tests.kernels.triton_aot import compile_kernel

ROOT = Path(__file__).resolve().parents[2]
F32, BF16, I64 = "*fp32", "*bf16", "*i64"
FLOATS = ("grad_mult", "lr", "step_size", "inv_sqrt_correction2", "decay", "strength", "ema_rate")
FLOATS += ("ema_threshold", "ema_rate_above", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "eps")
SHAPE = {"n": "i64", "first_block": "i32", "BLOCK": triton_kernels.BLOCK, "MASKED": False}
NO_TABLE = {"starts": None, "first_segment": None, "segment_strength": None}
TABLE = {"starts": I64, "first_segment": I64, "segment_strength": F32}

ADAMW = (
    SHAPE
    | NO_TABLE
    | dict.fromkeys(FLOATS, "fp32")
    | {"segment_decay": None, "PROXIMAL": False, "EMA_BY_FISHER": False}
)
ADAMW |= {"param": F32, "grad": F32, "exp_avg": F32, "exp_avg_sq": F32}
ADAMW |= dict.fromkeys(("anchor", "fisher", "ema", "param_out", "partial", "nonfinite", "found_inf", "scalars"))
FULL = (
    ADAMW | TABLE | {"segment_decay": F32, "grad": BF16, "anchor": BF16, "fisher": BF16, "ema": F32, "param_out": BF16}
)
FULL |= {"partial": F32, "nonfinite": I64, "found_inf": F32, "scalars": F32}
PENALTY = SHAPE | {"partial": F32, "strength_on_device": None, "strength": "fp32"}
NORM = PENALTY | TABLE | {"squares": F32, "mult_on_device": None, "grad_mult": "fp32"}
EMA = SHAPE | {"ema": F32, "param": BF16, "seed": None, "rate_on_device": None, "rate": "fp32"}

VARIANTS = {
    "adamw": (triton_kernels.adamw_kernel, ADAMW),
    "adamw with everything": (triton_kernels.adamw_kernel, FULL),
    "adamw without segments": (triton_kernels.adamw_kernel, FULL | NO_TABLE | {"segment_decay": None}),
    "adamw with everything, fp32": (triton_kernels.adamw_kernel, FULL | {"grad": F32, "anchor": F32, "fisher": F32}),
    "adamw with everything, proximal": (triton_kernels.adamw_kernel, FULL | {"PROXIMAL": True}),
    "adamw with everything, ema by fisher": (
        triton_kernels.adamw_kernel,
        FULL | {"PROXIMAL": True, "EMA_BY_FISHER": True, "fisher": F32},
    ),
    "adamw with everything, last block": (triton_kernels.adamw_kernel, FULL | {"MASKED": True}),
    "ema": (triton_kernels.ema_kernel, EMA),
    "ema in bf16": (triton_kernels.ema_kernel, EMA | {"ema": BF16, "seed": I64}),
    "fisher": (
        triton_kernels.fisher_kernel,
        SHAPE | {"fisher": F32, "grad": BF16, "weight_on_device": None, "weight": "fp32"},
    ),
    "penalty": (triton_kernels.penalty_kernel, PENALTY | dict.fromkeys(("grad", "param", "anchor", "fisher"), BF16)),
    "norm": (triton_kernels.norm_kernel, NORM | dict.fromkeys(("grad", "param", "anchor", "fisher"), BF16)),
}


def is_wide(arguments: dict) -> bool:
    return arguments.get("starts") is not None or bool(arguments.get("PROXIMAL") or arguments.get("EMA_BY_FISHER"))


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_kernel_compiles_without_spills_and_with_wide_accesses(name, arch):
    kernel, arguments = VARIANTS[name]
    wide = is_wide(arguments)
    built = compile_kernel(kernel, arguments, arch, **triton_kernels.options(arguments["MASKED"], wide))
    assert (built.stack, built.local) == (0, 0), f"{name} spills on sm_{arch}: {built}"
    assert arguments["MASKED"] or built.registers <= triton_kernels.MAX_REGISTERS[wide], (
        f"{name}: {built.registers} registers on sm_{arch}"
    )
    assert "fma.rn" not in built.ptx, "contracted: elements would no longer agree bitwise with the C++ kernels"
    assert arguments["MASKED"] or "ld.global.v4" in built.ptx, (
        "narrow loads: the kernel cannot reach the memory's bandwidth"
    )


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("adamw") and "last" not in name])
def test_the_step_loads_all_its_streams_before_the_first_barrier(name):
    kernel, arguments = VARIANTS[name]
    options = triton_kernels.options(False, is_wide(arguments))
    built = compile_kernel(kernel, arguments | {"nonfinite": None}, 90, **options)
    before, after = loads_around_the_first_barrier(built.memory_accesses)
    assert before, f"{name}: no 16-byte load"
    assert not after, f"{name} waits for a barrier before it loads"
    if arguments["nonfinite"] is not None:  # as the engine calls it; blocks with values that are not finite read again
        counting = compile_kernel(kernel, arguments, 90, **options)
        assert loads_around_the_first_barrier(counting.memory_accesses)[0] == before, f"{name}, with the count"


def loads_around_the_first_barrier(accesses: tuple[str, ...]) -> tuple[int, int]:
    """Numbers of 16-byte loads before and behind the first barrier of a program."""
    barrier = next((i for i, access in enumerate(accesses) if access.startswith("BAR")), len(accesses))
    loads = [i for i, access in enumerate(accesses) if access.startswith("LDG.E.128")]
    return sum(i < barrier for i in loads), sum(i > barrier for i in loads)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_final_sum_compiles_without_spills(arch):
    arguments = {"partial": F32, "result": F32, "count": "i32", "scale": 0.5, "LANES": triton_kernels.LANES}
    built = compile_kernel(triton_kernels.sum_kernel, arguments, arch, num_warps=triton_kernels.NUM_WARPS)
    assert (built.stack, built.local) == (0, 0)


def test_the_kernels_pass_every_check_in_the_interpreter_and_equal_cpp_bitwise():
    command = [sys.executable, "-m", "tests.kernels.flat_interpreted"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
