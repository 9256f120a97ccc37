"""The C++ back end: the same result on every instruction set and thread count, forks, and no compiler."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from safecl.kernels import backends, native
from tests.kernels import flat_suite as suite

ROOT = Path(__file__).resolve().parents[2]
built = pytest.mark.skipif(bool(native.missing()), reason="the C++ library is not built")
NUMEL = 300_007


@contextmanager
def instruction_set(name: str):
    before = native.instruction_set()
    if not native.library().safecl_use_instruction_set(name.encode()):
        pytest.skip(f"this CPU has no {name}")
    try:
        yield
    finally:
        native.library().safecl_use_instruction_set(before.encode())


def all_results(numel: int = NUMEL) -> dict[str, torch.Tensor]:
    """One call of everything, by name; bitwise comparable."""
    found = {}
    for name in ("everything", "everything proximal", "bf16 gradient"):
        _, buffers, losses = suite.run_case(suite.CASES[name], numel, steps=2)
        found |= {f"{name} {k}": b.inner.clone() for k, b in buffers.items()}
        found |= {f"{name} loss {i}": loss for i, loss in enumerate(losses) if loss is not None}
    g = torch.Generator().manual_seed(0)
    a, b, c, d = (torch.randn(numel, generator=g) for _ in range(4))
    low = b.bfloat16()
    found["ema"] = suite.ema_update_(a.clone(), low, 0.99)
    found["stochastic"] = suite.ema_update_(a.bfloat16(), b, 0.99, generator=torch.Generator().manual_seed(1))
    found["fisher"] = suite.fisher_accumulate_(c.abs(), low, 0.7)
    found["pulled"], found["pulled low"] = a.clone(), low.clone()
    found["penalty"] = suite.fisher_penalty_(found["pulled"], b, c.bfloat16(), d.abs(), 0.3)
    found["penalty low"] = suite.fisher_penalty_(found["pulled low"], b, c, None, 0.3)
    table = ([0, numel // 3, numel], [0.1, 0.4], None)
    found["norm"], found["norm loss"] = suite.penalized_grad_norm(a, b, c, d.abs(), 0.3, grad_scale=3.0, segments=table)
    return found


def assert_same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    different = [
        k for k in first if not torch.equal(suite._bits(first[k].reshape(-1)), suite._bits(second[k].reshape(-1)))
    ]
    assert not different, f"different bits: {different}"


@built
@pytest.mark.parametrize("name", ["avx2", "baseline"])
def test_every_instruction_set_gives_the_same_bits(name):
    want = all_results()
    with instruction_set(name):
        assert_same_bits(want, all_results())


@built
def test_the_twin_gives_the_same_bits_apart_from_its_square_root_and_the_order_of_sums():
    """torch's own sqrt is MKL's, which rounds 0.6 % of its results the other way: param follows it by an ulp, and ema
    and the next moment follow param."""
    with backends.using("torch"):
        twin = all_results(70_001)
    ours = all_results(70_001)
    sums = {k for k in twin if "loss" in k or "penalty" in k or k == "norm"}
    rooted = {k for k in twin if k.endswith((" param", " ema", " out", " exp_avg", " exp_avg_sq"))}
    assert_same_bits({k: t for k, t in twin.items() if k not in sums | rooted}, ours)
    for k in rooted:
        assert float((twin[k] != ours[k]).float().mean()) < 0.01, k
        assert suite.relative_error(ours[k], twin[k]) <= (1e-8 if ours[k].dtype == suite.F32 else 1e-3), k
    for k in sums:
        assert abs(float(twin[k]) - float(ours[k])) <= 1e-6 * abs(float(twin[k])), k


@built
def test_a_copy_that_bypasses_the_cache_is_the_same_copy():
    """Large aligned copies are streamed to memory, misaligned ones are not."""
    numel = 600_001
    found = [suite.run_case(suite.CASES["everything"], numel, steps=1, lead=lead)[1]["out"] for lead in (4, 3)]
    assert found[0].inner.data_ptr() % 16 == 0 and found[1].inner.data_ptr() % 16 != 0
    assert torch.equal(suite._bits(found[0].inner), suite._bits(found[1].inner))
    found[0].assert_surroundings_untouched()


@pytest.fixture(params=["openmp", "pool"])
def threads_from(request):
    """torch's OpenMP threads, or the library's own."""
    if native.library().safecl_use_openmp(request.param == "openmp") != (request.param == "openmp"):
        pytest.skip("torch has no OpenMP runtime here")
    yield
    native.library().safecl_use_openmp(1)


@built
@pytest.mark.parametrize("threads", [1, 3, 7])
def test_the_number_of_threads_changes_no_bit(threads, threads_from, monkeypatch):
    want = all_results()
    monkeypatch.setenv("SAFECL_NUM_THREADS", str(threads))
    assert native.num_threads() == threads
    assert_same_bits(want, all_results())


@built
def test_callers_in_several_threads_do_not_disturb_each_other(threads_from, monkeypatch):
    monkeypatch.setenv("SAFECL_NUM_THREADS", "2")
    want, found = all_results(), {}

    def call(i):
        found[i] = all_results()

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=60)
    for i in range(4):
        assert_same_bits(want, found[i])


def _in_child(queue, tensors):
    suite.ema_update_(*tensors, 0.5)
    queue.put(
        float(tensors[0].numpy().sum())
    )  # torch's own sum would wait for OpenMP's threads, which did not come along


@built
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork in a process with threads: the very thing under test
def test_a_forked_child_can_call_the_kernels_again(threads_from, monkeypatch):
    monkeypatch.setenv("SAFECL_NUM_THREADS", "2")
    ema, param = torch.zeros(NUMEL), torch.ones(NUMEL)
    suite.ema_update_(ema, param, 0.0)  # the parent has a team of threads now
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, (torch.zeros(NUMEL), param)))
    child.start()
    try:
        assert queue.get(timeout=30) == pytest.approx(NUMEL / 2)
    finally:
        child.join(5)
        child.kill()


@built
def test_elements_beyond_two_to_the_31_are_reached():
    """A buffer of 4.3 GB whose untouched pages the system never makes; the kernel only reads."""
    numel = 2**31 + 4099
    grad = torch.from_numpy(np.zeros(numel, dtype=np.int16)).view(torch.bfloat16)
    tail = torch.randn(5000, generator=torch.Generator().manual_seed(0)).bfloat16()
    grad[-5000:] = tail
    square, _ = suite.penalized_grad_norm(grad)
    assert float(square) == pytest.approx(float(tail.double().square().sum()), rel=1e-6)


@built
def test_the_librarys_own_threads_take_no_signals():
    script = (
        "import os, signal, threading, time, torch\n"
        "from safecl.kernels import ema_update_, native\n"
        "native.library().safecl_use_openmp(0)\n"
        "ema_update_(torch.zeros(300_000), torch.ones(300_000), 0.5)\n"
        "status = lambda tid: dict(line.split(':', 1) for line in open(f'/proc/self/task/{tid}/status'))\n"
        "mask = lambda tid: int(status(tid)['SigBlk'], 16)\n"
        "blocked = [mask(t) >> (signal.SIGINT - 1) & 1 for t in os.listdir('/proc/self/task')]\n"
        "assert any(blocked) and not mask(os.getpid()) >> (signal.SIGINT - 1) & 1, blocked\n"
    )
    env = os.environ | {"SAFECL_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], check=True, env=env, timeout=120)


def test_torchruns_default_of_one_thread_is_not_taken_for_a_wish(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    for name in ("SAFECL_NUM_THREADS", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert native.num_threads() == 1
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert native.num_threads() == cores
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * cores))
    assert native.num_threads() == 1


@built
def test_the_library_is_built_from_these_sources():
    assert native.library().safecl_source_hash().decode() == native.source_hash()


def test_without_the_library_the_twin_runs_and_one_line_says_so(monkeypatch, caplog):
    monkeypatch.setattr(native, "missing", lambda: "the C++ library is not built")
    backends._choose.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="safecl.kernels"):
            for _ in range(3):
                suite.ema_update_(torch.zeros(8), torch.ones(8), 0.5)
        assert [r.getMessage() for r in caplog.records] == [
            "flat kernels on cpu run in torch: the C++ library is not built"
        ]
        row = next(c for c in backends.table() if c.kernel == "adamw_step_" and c.device == "cpu")
        assert (row.backend, row.note) == ("torch", "the C++ library is not built")
    finally:
        backends._choose.cache_clear()


def test_a_build_without_a_compiler_succeeds_with_one_clear_line(tmp_path):
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "safecl" / "kernels").mkdir(parents=True)
    shutil.copy(ROOT / "safecl" / "kernels" / "native.py", tmp_path / "safecl" / "kernels")
    (tmp_path / "README.md").write_text("x")
    shutil.copy(ROOT / "LICENSE", tmp_path)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"CXX": "no-such-compiler"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "safecl" in line)
    assert line == (
        "safecl: C++ kernels not built: no C++ compiler (no-such-compiler is not on the PATH); "
        "CPU tensors will use the slower torch kernels."
    )
    assert not list(tmp_path.glob("**/*.so"))


def test_a_forced_back_end_that_cannot_run_is_refused_by_name(monkeypatch):
    with (
        pytest.raises(ValueError, match="SAFECL_KERNELS is 'cuda'; the flat kernels have triton, cpp, torch"),
        backends.using("cuda"),
    ):
        suite.ema_update_(torch.zeros(2), torch.ones(2), 0.5)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backends._choose.cache_clear()
    with pytest.raises(ValueError, match="triton does not run on cpu tensors"), backends.using("triton"):
        suite.ema_update_(torch.zeros(2), torch.ones(2), 0.5)


MEMORY = """
import resource, sys, torch
from safecl.kernels import adamw_step_, backends
torch.set_num_threads(1)
n = 8_000_003
buffers = [torch.rand(n) for _ in range(6)]
low = [torch.rand(n).bfloat16() for _ in range(2)]
out = torch.zeros(n, dtype=torch.bfloat16)
p, g, m, v, ema, _ = buffers
kwargs = dict(lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, strength=0.1, ema_decay=0.9)
def step(k):
    states = (p[:k], g[:k], m[:k], v[:k])
    adamw_step_(*states, step=1, anchor=low[0][:k], fisher=low[1][:k], ema=ema[:k], param_out=out[:k], **kwargs)
for backend in ("torch", "cpp"):
    with backends.using(backend):
        step(200_000)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step(n)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 0.01 * n * 42, (backend, grown)
"""


@built
def test_a_step_adds_less_than_one_percent_of_the_shard_to_peak_memory():
    subprocess.run([sys.executable, "-c", MEMORY], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=300)
