"""Launch every Triton kernel as safecl launches it, on a stand-in for CUDA's driver:

    PYTHONPATH=... python -m tests.kernels.launch_binding 90 [80 100]

Triton binds the arguments, specialises and compiles them for sm_<arch> as on a GPU; a launch compares them with the
compiled program and runs nothing. Prints one JSON object: Triton's version, the launches of each kernel, and what was
wrong. A process of its own, because another version of Triton may come first on its path.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from safecl import kernels
from safecl.kernels import DenseTeacher, TopKTeacher, backends
from safecl.kernels.flat import calls
from safecl.kernels.flat import triton_kernels as flat_kernels
from safecl.kernels.head import triton_kernels as head_kernels
from safecl.kernels.head import triton_rows
from safecl.kernels.head.backend import RowOptions
from safecl.kernels.head.matmul import padded_width

SIZES = (5000, 2048, 1)
"""Elements: whole blocks and a rest, one block, and a number that Triton would make a constant."""
BYTES = {"i1": 4, "i32": 4, "i64": 8, "fp32": 4}
TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}


class Driver:
    """The part of Triton's driver that a launch asks."""

    def __init__(self, arch: int):
        self.target, self.utils = GPUTarget("cuda", arch, 32), self
        self.launcher_cls = lambda source, metadata: Launcher(source)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        assert kernel[:4] == b"\x7fELF", "no machine code"
        return 1, 1, 0, 0, 1024


class Launcher:
    """Compares the arguments of each launch with the types that the kernel was compiled for."""

    def __init__(self, source: Any):
        self.name, self.signature = source.fn.__name__, dict(source.signature)
        self.aligned = {path[0] for path, facts in source.attrs.items() if ["tt.divisibility", 16] in facts}
        self.constants = {path[0]: value for path, value in source.constants.items()}

    def __call__(self, *arguments: Any) -> None:
        grid, values = arguments[:3], arguments[-len(self.signature) :]
        assert all(isinstance(side, int) and side >= 1 for side in grid), f"{self.name}: grid {grid}"
        for place, ((name, kind), value) in enumerate(zip(self.signature.items(), values, strict=True)):
            problem = self.problem(place, kind, value)
            assert not problem, f"{self.name}: {name} ({kind}) is {problem}"
        launches[self.name] += 1

    def problem(self, place: int, kind: str, value: Any) -> str:
        if kind == "constexpr":
            return "" if self.constants[place] == value or self.constants[place] is value else f"not {value!r}"
        if isinstance(value, torch.Tensor):
            misplaced = place in self.aligned and value.data_ptr() % 16
            return "not aligned" if misplaced else "" if TYPES[value.dtype] == kind else f"{value.dtype}"
        if kind == "fp32":
            return "" if isinstance(value, (int, float)) else f"{value!r}"
        low, high = {"i1": (0, 1), "i32": (-(2**31), 2**31 - 1), "i64": (-(2**63), 2**63 - 1)}.get(kind, (1, 0))
        whole = place in self.aligned and value % 16
        return f"{value!r}" if whole or not (isinstance(value, int) and low <= value <= high) else ""


launches: Counter[str] = Counter()


def checked_run(function: JITFunction, *arguments: Any, **options: Any) -> Any:
    """Launch, and compare the parameters of the compiled program with the bound arguments."""
    kernel = original_run(function, *arguments, **options)
    entry = re.search(r"\.entry \w+\((.*?)\)", kernel.asm["ptx"], re.S)[1]
    sizes = [8 if "64" in kind else 4 for kind in re.findall(r"\.param \.(\w+)", entry)]
    kinds = [kind for kind in kernel.src.signature.values() if kind != "constexpr"]
    wanted = [8 if kind.startswith("*") else BYTES[kind] for kind in kinds]
    scratch = len(sizes) - len(wanted)
    assert scratch in (0, 1, 2) and sizes == wanted + [8] * scratch, f"{function.__name__}: {sizes} for {kinds}"
    return kernel


original_run = JITFunction.run


# ---------------------------------------------------------------------------------------------------------------- calls


def flat_calls(numel: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls of the public functions, with numbers and with device scalars, aligned and not."""
    new = lambda dtype=torch.float32, shift=0: torch.zeros(numel + shift, dtype=dtype)[shift:]  # noqa: E731
    half, scalar = torch.bfloat16, torch.tensor(0.5)
    yield "ema", lambda: kernels.ema_update_(new(), new(half), 0.9)
    yield "ema, rate on the device", lambda: kernels.ema_update_(new(), new(), scalar)
    yield "ema in bf16", lambda: kernels.ema_update_(new(half), new(half), 0.9, generator=torch.Generator())
    yield "fisher", lambda: kernels.fisher_accumulate_(new(), new(half), 3)
    yield "fisher, weight on the device", lambda: kernels.fisher_accumulate_(new(), new(), scalar)
    yield "penalty", lambda: kernels.fisher_penalty_(new(half), new(), new(half), new(half), 0.1)
    yield "penalty without Fisher", lambda: kernels.fisher_penalty_(new(), new(), new(), None, scalar)
    yield "norm", lambda: calls.penalized_grad_norm(new())
    yield "norm of both", lambda: calls.penalized_grad_norm(new(), new(), new(half), new(half), 0.1)
    common = dict(step=3, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for shift in (0, 1):
        state = [new(shift=shift) for _ in range(4)]
        yield f"step, shifted by {shift}", lambda state=state: kernels.adamw_step_(*state, **common)
    penalty = dict(anchor=new(half), fisher=new(half), strength=0.1)
    average = dict(ema=new(), ema_decay=0.9, param_out=new(half), nonfinite=torch.zeros(1, dtype=torch.int64))
    full = penalty | average | common
    more = dict(clip_coef=scalar, grad_scale=2, found_inf=torch.zeros(1))
    fourth = numel // 4
    offsets = torch.tensor([0, fourth, fourth, numel])
    table = (offsets, torch.ones(3), torch.ones(3))
    step = lambda **options: kernels.adamw_step_(new(), new(half), new(), new(), **options)  # noqa: E731
    yield "step with everything", lambda: step(**full, **more)
    yield "step in segments", lambda: step(**full, segments=table)
    yield "step, lr on the device", lambda: step(**(full | {"lr": scalar, "strength": scalar}))
    yield "proximal step", lambda: step(**full, proximal=True)
    by_fisher = dict(ema_threshold=0.5, ema_decay_above=0.99)
    yield "average by Fisher", lambda: step(**(full | {"fisher": new()}), **by_fisher)


def head_calls(rows: int, vocab: int, k: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Tiles as the head makes them: padded, in three dtypes, with and without labels, teacher and gradient."""
    labels, weights = torch.zeros(rows, dtype=torch.int64), torch.ones(rows)

    def tile(dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(rows, padded_width(vocab), dtype=dtype)[:, :vocab]

    for divergence in ("forward_kl", "reverse_kl", "jsd", "mse"):
        options = RowOptions(divergence, temperature=2.0, padded=True)
        dense = (tile(), tile(), labels, weights, weights, options, tile(torch.bfloat16))
        yield f"dense {divergence}", lambda dense=dense: triton_rows.dense_rows(*dense)
    yield "labels alone", lambda: triton_rows.dense_rows(tile(), None, labels, weights, None, RowOptions(padded=True))
    capped = RowOptions("jsd", softcap=9.0, teacher_softcap=9.0, logit_scale=2.0)
    given = torch.zeros(rows, vocab, dtype=torch.bfloat16)
    other = torch.zeros(rows, vocab + 3, dtype=torch.float16)
    yield "given logits", lambda: triton_rows.dense_rows(given, other, None, None, weights, capped, given)
    for divergence, mode in (("forward_kl", "tail"), ("jsd", "truncated"), ("mse", "renormalised")):
        options = RowOptions(divergence, topk_mode=mode, padded=True)
        cached = torch.zeros(rows, k, dtype=torch.float16), torch.arange(k).expand(rows, k), torch.zeros(rows)
        arguments = (tile(), *cached, labels, weights, weights, options, tile(torch.bfloat16))
        yield f"top-k {divergence}", lambda arguments=arguments: triton_rows.topk_rows(*arguments)


FACTORS = ((40, 1.0), (57, 0.5), (1, 1.0), (64, 2.75), (16, 0.0))
"""Replayed tokens and the factor of their weights, as a controller changes both from step to step."""


def programs_by_factor() -> Iterator[int]:
    """Yield the number of compiled programs after the loss of each of these steps, with its gradient."""
    torch.manual_seed(0)
    weight = torch.randn(699, 32, requires_grad=True)
    for tokens, factor in FACTORS:
        hidden, labels = torch.randn(tokens, 32, requires_grad=True), torch.zeros(tokens, dtype=torch.int64)
        weights = torch.full((tokens,), factor / tokens)
        chances = torch.randn(tokens, 9).log_softmax(1)
        stored = TopKTeacher(chances[:, :8].contiguous(), torch.arange(8).expand(tokens, 8), chances[:, 8], 1.0, 699)
        for teacher in (stored, DenseTeacher(torch.randn(tokens, 32), torch.randn(699, 32))):
            found = kernels.linear_distill_loss(
                hidden, weight, labels=labels, ce_weights=weights, teacher=teacher, kd_weights=weights
            )
            found.loss.backward()
        yield sum(len(cache[0]) for kernel in jit_functions() for cache in kernel.device_caches.values())


def jit_functions() -> Iterator[JITFunction]:
    for function in (*vars(flat_kernels).values(), *vars(head_kernels).values()):
        if isinstance(function, JITFunction):
            yield function


def problems() -> Iterator[str]:
    made = [(f"{n} elements: {name}", call) for n in SIZES for name, call in flat_calls(n)]
    for rows, vocab, k in ((5, 699, 8), (1, 16, 1)):
        made += [(f"[{rows}, {vocab}]: {name}", call) for name, call in head_calls(rows, vocab, k)]
    for name, call in made:
        try:
            call()
        except Exception as error:  # every kind of failure of a binding, a compilation or a comparison
            yield f"{name}: {type(error).__name__}: {str(error)[:300]}"


if __name__ == "__main__":
    JITFunction.run = checked_run
    backends.PREFERENCE["cpu"] = ("triton",)
    found: dict[str, Any] = {"triton": triton.__version__, "problems": [], "launches": {}}
    for arch in map(int, sys.argv[1:]):
        driver.set_active(Driver(arch))
        for function in jit_functions():
            function.device_caches.clear()
        found["programs"] = list(programs_by_factor())
        found["problems"] += [f"sm_{arch}: {problem}" for problem in problems()]
    found["launches"] = dict(launches)
    print(json.dumps(found))
