"""The head's Triton kernels without a GPU: their numbers through the interpreter, their registers through ahead-of-time
compilation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from safecl.kernels.head import triton_kernels, triton_rows
from safecl.kernels.head.backend import RowOptions
from tests.kernels.head_suite import CASES
from tests.kernels.triton_aot import compile_kernel

ROOT = Path(__file__).resolve().parents[2]
PER_DIVERGENCE = ("a masked token is not there", "p equal to q is exactly zero")
EDGES = [
    *(f"{divergence}: {what}" for divergence in ("forward_kl", "reverse_kl", "jsd", "mse") for what in PER_DIVERGENCE),
    *("k = V equals dense", "a loss below resolution is not negative", "a teacher that excludes a token"),
    *("an infinite loss", "a masked label", "given logits", "rows of weight 0", "padded rows"),
]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.kernels.head_interpreted"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", [*CASES, *EDGES])
def test_the_kernels_match_the_fp64_oracle_in_the_interpreter(interpreted, name):
    assert not interpreted[name], interpreted[name]


ROW = {
    "student_stride": "i32",
    "dlogits": "*bf16",
    "dlogits_stride": "i32",
    "labels": "*i64",
    "ce_weights": "*fp32",
    "kd_weights": "*fp32",
    "losses": "*fp32",
    "rows": "i32",
    "vocab": "i32",
    "inverse_t": "fp32",
    "beta": "fp32",
    "kd_scale": "fp32",
    "z_loss": "fp32",
    "scale": "fp32",
    "cap": "fp32",
    "student": "*fp32",
    "HAS_LABELS": True,
    "SHAPE": 0,
    "SAME": True,
    "NEEDS_GRAD": True,
    "BLOCK": triton_rows.BLOCK,
}
DENSE = {
    **ROW,
    "teacher": "*fp32",
    "teacher_stride": "i32",
    "shared": "i32",
    "t_scale": "fp32",
    "t_cap": "fp32",
    "T_SHAPE": 0,
    "SAME_WIDTH": True,
}
TOPK = {
    **ROW,
    "top": "*fp32",
    "top_grad": "*fp32",
    "log_q": "*fp16",
    "indices": "*i64",
    "log_tail": "*fp16",
    "k": "i32",
}
ARCHITECTURES = (80, 90, 100)
DIVERGENCES = {"none": 0, "forward_kl": 1, "reverse_kl": 2, "jsd": 3, "mse": 4}
CODES = {"*fp32": torch.float32, "*bf16": torch.bfloat16, "*fp16": torch.float16}
# What a tile beside the teacher's tile is; cached logits at another temperature; distill_loss with everything that
# costs registers.
TILES: dict = {}
CACHED = {"teacher": "*fp16", "SAME": False}
GIVEN = {"student": "*bf16", "teacher": "*bf16", "SAME": False, "SAME_WIDTH": False, "SHAPE": 2, "T_SHAPE": 2}
VARIANTS = [
    *(pytest.param(TILES, name, id=f"tiles-{name}") for name in DIVERGENCES),
    pytest.param(CACHED, "forward_kl", id="cached-forward_kl"),
    pytest.param(GIVEN, "forward_kl", id="given-forward_kl"),
    pytest.param(GIVEN, "jsd", id="given-jsd"),
]


def _assert_lean(kernel, arguments: dict, arch: int, limit: int) -> None:
    compiled = compile_kernel(kernel, arguments, arch, num_warps=triton_rows.NUM_WARPS, maxnreg=limit)
    assert compiled.stack == compiled.local == 0, f"{compiled.stack} bytes of stack, {compiled.local} of local memory"
    assert compiled.registers <= limit


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("changes, divergence", VARIANTS)
def test_the_dense_kernel_compiles_without_spills(changes, divergence, arch):
    arguments = {**DENSE, **changes, "DIVERGENCE": DIVERGENCES[divergence]}
    options = RowOptions(divergence, softcap=9.0 if arguments["SHAPE"] == 2 else None)
    limit = triton_rows.register_limit(options, CODES[arguments["student"]], CODES[arguments["teacher"]])
    _assert_lean(triton_kernels.dense_rows_kernel, arguments, arch, limit)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("divergence, mode, slots", [(3, 0, triton_rows.MAX_EVENTS), (1, 1, 64), (2, 2, 64)])
def test_the_top_k_kernel_compiles_without_spills(divergence, mode, slots, arch):
    arguments = {**TOPK, "DIVERGENCE": divergence, "MODE": mode, "BLOCK_K": slots, "SAME": slots == 64}
    _assert_lean(triton_kernels.topk_rows_kernel, arguments, arch, triton_rows.LEAN)


def test_three_programs_share_a_multiprocessor_where_the_time_goes():
    plain = RowOptions("forward_kl", temperature=2.0)
    assert triton_rows.register_limit(plain, torch.float32, torch.float32) * triton_rows.NUM_WARPS * 32 * 3 <= 65536


class _Guard:
    """Records the kernels that are launched, and whether the student's device is the current one then."""

    def __init__(self):
        self.device, self.launched = None, []

    def device_of(self, tensor):
        self.entering = tensor
        return self

    def __enter__(self):
        self.device = self.entering

    def __exit__(self, *_):
        self.device = None

    def __getitem__(self, grid):
        return lambda student, *_, **__: self.launched.append(self.device is student)


def test_kernels_run_on_the_students_device_whichever_is_the_current_one(monkeypatch):
    guard = _Guard()
    monkeypatch.setattr(torch.cuda, "device_of", guard.device_of)
    monkeypatch.setattr(triton_rows, "dense_rows_kernel", guard)
    monkeypatch.setattr(triton_rows, "topk_rows_kernel", guard)
    student, options = torch.zeros(2, 9), RowOptions("forward_kl")
    triton_rows.dense_rows(student, torch.zeros(2, 9), None, None, torch.ones(2), options)
    stored, indices = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)
    triton_rows.topk_rows(student, stored, indices, torch.zeros(2), None, None, torch.ones(2), options)
    assert guard.launched == [True, True]


@pytest.mark.parametrize("vocab", [32000, 32001, 128255])
def test_the_width_that_kernels_get_is_a_multiple_of_16_for_any_vocabulary(monkeypatch, vocab):
    """Such a width lets Triton load four values at once, where an odd one makes 32 loads of one."""
    from safecl.kernels.head import chunks, matmul
    from safecl.kernels.head.calls import linear_distill_loss
    from safecl.kernels.head.teachers import DenseTeacher

    seen = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *arguments, **_: seen.append((arguments[1], arguments[11], arguments[12]))

    for module in (matmul, chunks):
        monkeypatch.setattr(module, "row_multiple", lambda device: 16)
        monkeypatch.setattr(module, "operand_dtype", lambda compute, device: compute)
    from safecl.kernels.head import segments

    monkeypatch.setattr(segments, "operand_dtype", lambda compute, device: compute)
    monkeypatch.setattr(chunks, "project", lambda x, weight, bias, out: out)
    from safecl.kernels.head import teacher_tiles

    monkeypatch.setattr(teacher_tiles, "project", lambda x, weight, bias, out: out)
    monkeypatch.setattr(chunks, "head_backend", lambda kernel, tensor: triton_rows)
    monkeypatch.setattr(triton_rows, "dense_rows_kernel", Recorder())
    hidden, weight = torch.zeros(2, 16, dtype=torch.bfloat16), torch.zeros(vocab, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        linear_distill_loss(hidden, weight, labels=torch.tensor([1, 2]), teacher=DenseTeacher(hidden, weight))
    width = -(-vocab // 16) * 16
    assert seen == [(width, width, width)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_width_that_is_a_multiple_of_16_loads_and_stores_whole_vectors(arch):
    arguments = {**DENSE, "DIVERGENCE": DIVERGENCES["forward_kl"]}
    wide = ("vocab", "shared", "student_stride", "teacher_stride", "dlogits_stride")
    options = dict(num_warps=triton_rows.NUM_WARPS, maxnreg=triton_rows.LEAN)
    odd = compile_kernel(triton_kernels.dense_rows_kernel, arguments, arch, **options)
    padded = compile_kernel(triton_kernels.dense_rows_kernel, arguments, arch, multiples_of_16=wide, **options)
    assert "ld.global.v4" in padded.ptx and "st.global.v4" in padded.ptx
    assert "ld.global.v4" not in odd.ptx
