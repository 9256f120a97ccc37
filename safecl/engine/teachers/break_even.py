"""The number of tokens from which a streamed teacher costs no time: copying a layer must not take longer than computing
with it.

    copy      bytes per weight / link rate                      per weight
    compute   2 FLOP * tokens / FLOP rate                       per weight
    hidden from   tokens >= bytes per weight * FLOP rate / (2 * link rate)          in one forward pass of one device

For bf16 weights that is FLOP rate / link rate. Below it a pass takes as long as the copy, for any number of tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from safecl.distributed import devices
from safecl.kernels import page_locked


@dataclass(frozen=True)
class Rates:
    """The rates that a device attains."""

    flop: float
    """FLOP per second of a large product in the run's dtype."""
    link: float
    """Bytes per second from pinned host memory to the device."""
    what: str
    """The device, and whether the rates were measured."""

    def break_even(self, bytes_per_weight: int) -> int:
        """Tokens of one forward pass of one device above which the copies are hidden."""
        return round(bytes_per_weight * self.flop / (2 * self.link))


ASSUMED = Rates(flop=530e12, link=50e9, what="assumed 530 TFLOP/s and 50 GB/s, there is no GPU to measure")


def measure(device: torch.device, dtype: torch.dtype, size: int = 4096) -> Rates:
    """Measure both rates on a GPU, in well under a second and 200 MB."""
    name = torch.cuda.get_device_name(device)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    host = page_locked.empty((2**26,), torch.uint8)
    target = torch.empty_like(host, device=device)
    flop = 2 * size**3 / _seconds(lambda: torch.mm(a, b), device)
    link = host.numel() / _seconds(lambda: target.copy_(host, non_blocking=True), device)
    return Rates(flop, link, f"measured on this {name}: {flop / 1e12:.0f} TFLOP/s, {link / 1e9:.0f} GB/s")


def _seconds(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    work()
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / repeats


def rates_here(dtype: torch.dtype) -> Rates | None:
    """Rates measured on this machine's GPU; without a GPU assumed for bf16, and None for other dtypes."""
    if devices.on_gpu():
        return measure(devices.device(), dtype)
    return ASSUMED if dtype == torch.bfloat16 else None


def advice(tokens: int, bytes_per_weight: int, rates: Rates, *, otherwise: str = "") -> str:
    """Return a line that says whether a pass of so many tokens on one device hides its copies; with `otherwise` at its
    end where it does not."""
    limit = rates.break_even(bytes_per_weight)
    line = f"hidden from {limit:,} tokens per pass and rank on ({rates.what}); here about {tokens:,}"
    return line if tokens >= limit else f"{line}, too few: a pass takes as long as the copy{otherwise}"


def alternative(source: str) -> str:
    """Return advice on what is faster than a pass that waits for its copies; empty where outputs cannot be recorded."""
    if source not in ("aligned", "previous"):
        return ""
    return "; recorded or stored outputs are faster (the method's outputs: recorded, memory.teacher.kind: topk)"
