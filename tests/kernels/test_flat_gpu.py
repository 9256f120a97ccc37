"""The flat kernels on a GPU: what the interpreter cannot show (launch/gpu_suite.sh runs these)."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from safecl.kernels import (
    Segments,
    adamw_step_,
    backends,
    ema_update_,
    fisher_accumulate_,
    fisher_penalty_,
    native,
    penalized_grad_norm,
)
from tests.kernels import flat_suite as suite

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

F32, BF16 = torch.float32, torch.bfloat16
CUDA = "cuda"


def on_device(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64, device=CUDA)


@contextmanager
def no_host_sync():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def shard(numel: int, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator(CUDA).manual_seed(seed)
    fresh = {name: torch.randn(numel, generator=g, device=CUDA) for name in ("param", "grad", "exp_avg", "ema")}
    fresh |= {name: torch.rand(numel, generator=g, device=CUDA) for name in ("exp_avg_sq", "fisher")}
    return fresh | {"anchor": fresh["param"].bfloat16(), "param_out": torch.zeros(numel, dtype=BF16, device=CUDA)}


SCALARS = {
    "step": 3,
    "lr": 1e-3,
    "strength": 0.5,
    "ema_decay": 0.99,
    "clip_coef": 0.5,
    "grad_scale": 2.0,
    "weight_decay": 0.1,
}


def step(tensors: dict[str, torch.Tensor], scalars: dict, **more) -> torch.Tensor:
    return adamw_step_(**tensors, **scalars, betas=(0.9, 0.99), eps=1e-8, **more)


def test_cuda_tensors_run_in_triton():
    assert {c.backend for c in backends.table() if c.device == "cuda" and c.kernel.endswith("_")} == {"triton"}


@pytest.mark.parametrize(
    "check", suite.quick_checks((0, 1, 2047, 2049, 300_007), CUDA, triton=True), ids=lambda c: c[0]
)
def test_the_flat_checks_hold(check):
    check[1]()


@pytest.mark.parametrize("name", ["everything", "everything proximal", "plain"])
def test_device_scalars_give_the_same_step(name):
    suite.check_step(suite.CASES[name], 5000, CUDA, wrap=lambda _, value: on_device(value))
    suite.check_found_inf(CUDA, wrap=on_device)
    suite.check_ema(BF16, 129, CUDA, wrap=on_device)
    suite.check_fisher(BF16, 129, CUDA, wrap=on_device)
    suite.check_penalty((F32, F32, BF16, BF16), 129, CUDA, wrap=on_device)


@pytest.mark.skipif(
    bool(native.missing()), reason="the C++ library is not built, and the twin's square root is torch's"
)
def test_elements_agree_bitwise_with_the_cpu_kernels():
    ours, cpu = shard(300_007), None
    cpu = {name: t.cpu() for name, t in ours.items()}
    losses = [step(tensors, SCALARS, segments=([0, 1000, 300_007], [0.1, 0.9], [0.0, 0.2])) for tensors in (ours, cpu)]
    for name, t in ours.items():
        assert torch.equal(suite._bits(t.cpu()), suite._bits(cpu[name])), name
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-6)


def test_no_kernel_waits_for_the_device():
    t, g = shard(100_003), torch.Generator(CUDA)
    scalars = {k: on_device(v) for k, v in SCALARS.items()}
    table = Segments(*(torch.tensor(x, device=CUDA) for x in ([0, 7, 100_003], [0.1, 0.2], [0.0, 0.1])))
    found, low = on_device(0.0), t["ema"].bfloat16()
    for _ in range(2):  # the first round compiles
        with no_host_sync():
            step(t, scalars, segments=table, found_inf=found)
            step(t, SCALARS)
            ema_update_(t["ema"], t["param_out"], scalars["ema_decay"])
            ema_update_(low, t["param"], 0.9, generator=g)
            fisher_accumulate_(t["fisher"], t["grad"], scalars["clip_coef"])
            fisher_penalty_(t["grad"], t["param"], t["anchor"], t["fisher"], scalars["strength"])
            penalized_grad_norm(
                t["grad"], t["param"], t["anchor"], t["fisher"], 0.5, grad_scale=scalars["grad_scale"], segments=table
            )


def test_new_values_never_recompile():
    from safecl.kernels.flat import triton_kernels

    t = shard(8192)
    step(t, SCALARS)
    compiled = lambda: sum(len(cache[0]) for cache in triton_kernels.adamw_kernel.device_caches.values())  # noqa: E731
    before = compiled()
    for i in range(1, 5):
        step(t, {k: v * (1 - 0.1 * i) if k != "step" else 100 * i + 1 for k, v in SCALARS.items()})
    assert compiled() == before


def test_a_step_is_capturable_and_replays_with_new_scalars():
    captured, plain = shard(50_001), shard(50_001)
    scalars = {k: on_device(v) for k, v in SCALARS.items()}
    start = {k: v.clone() for k, v in captured.items()}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(captured, scalars)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(captured, scalars)
    for name, t in captured.items():
        t.copy_(start[name])
    scalars["lr"].fill_(5e-3)
    graph.replay()
    want = step(plain, SCALARS | {"lr": 5e-3})
    torch.cuda.synchronize()
    assert float(loss) == float(want)
    assert all(suite.relative_error(captured[k], plain[k]) <= 1e-7 for k in plain if k != "param_out")


def test_work_is_ordered_on_the_callers_stream():
    ema, param = torch.zeros(20_000_000, device=CUDA), torch.ones(20_000_000, device=CUDA)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        param.mul_(3.0)
        ema_update_(ema, param, 0.5)
        total = ema.sum(dtype=torch.float64)
    stream.synchronize()
    assert float(total) == 1.5 * 20_000_000


def test_more_than_two_to_the_31_elements():
    numel = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 60e9:
        pytest.skip("needs 60 GB of device memory")
    tail = slice(numel - 5000, numel)
    names = ("param", "exp_avg", "exp_avg_sq", "ema")
    large = {name: torch.full((numel,), 0.5, device=CUDA) for name in names}
    large["grad"] = torch.full((numel,), 0.25, dtype=BF16, device=CUDA)
    small = shard(5000)
    for name in (*names, "grad"):
        large[name][tail] = small[name].to(large[name].dtype)
    want = {name: large[name][tail].clone() for name in large}
    scalars = {k: v for k, v in SCALARS.items() if k != "strength"}
    step(large, scalars)
    step(want, scalars)
    for name in names:
        assert torch.equal(large[name][tail], want[name]), name
        assert len(torch.unique(large[name][: numel - 5000 : 1_000_003])) == 1, (
            f"{name}: an element in the middle was missed"
        )
    square, _ = penalized_grad_norm(large["grad"])
    exact = 0.0625 * (numel - 5000) + float(large["grad"][tail].double().square().sum())
    assert float(square) == pytest.approx(exact, rel=1e-6)


def test_peak_memory_grows_by_less_than_one_percent():
    t = shard(50_000_000)
    step(t, SCALARS)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(t, SCALARS, segments=([0, 10, 50_000_000], None, [0.0, 0.1]))
    assert torch.cuda.max_memory_allocated() - before < 0.01 * 50_000_000 * 42


def test_a_thousand_updates_do_not_drift():
    suite.check_ema_drift(CUDA)
