"""The flat family in plain torch: the definition of the Triton and C++ kernels, and the fallback where neither runs.

It processes the buffers in chunks, so that the temporaries fit the cache and are far below 1 % of a shard. The
operations have the order of the kernels, with one rounding each, so that the elements agree bitwise with the other back
ends, apart from sqrt: torch's CPU sqrt is that of MKL, which sometimes differs by one ulp.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from safecl.kernels.flat.arguments import AdamWArguments, Scalar, Segments

# Elements of a chunk: its temporaries fit the L2 cache of a CPU core; a GPU needs longer launches.
CHUNK = {"cpu": 1 << 15, "cuda": 1 << 22}


def ema_update(ema: Tensor, param: Tensor, rate: Scalar, seed: Tensor | None) -> None:
    """Add rate * (param - ema) to ema; a bf16 ema is rounded stochastically with random bits from `seed`."""
    for start, (e, p) in _chunks(ema, param):
        e32 = e.float()
        new = e32 + rate * (p.float() - e32)
        e.copy_(new if seed is None else stochastic_bf16(new, seed, start))


def stochastic_bf16(values: Tensor, seed: Tensor, start: int) -> Tensor:
    """Round fp32 to bf16, upwards with probability (value - lower) / (upper - lower).

    16 random bits are added below the mantissa of bf16, then these bits are cut off.
    """
    index = torch.arange(start, start + values.numel(), device=values.device, dtype=torch.int64)
    noise = random_words(index, seed) >> 16
    bits = values.view(torch.int32).to(torch.int64)
    rounded = ((bits + noise) >> 16 << 16).to(torch.int32).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def random_words(index: Tensor, seed: Tensor) -> Tensor:
    """Return a uniform 32-bit word (in int64) for each element index.

    It is a counter-based hash, so that every back end draws the same numbers.
    """
    low, high = index & 0xFFFFFFFF, index >> 32
    return _mix((_mix(low ^ seed[0]) + seed[1] + high * 0x9E3779B9) & 0xFFFFFFFF)


def _mix(x: Tensor) -> Tensor:
    """Mix the bits of 32-bit words: "lowbias32" (C. Wellons, hash-prospector).

    Each input bit flips each output bit in about half of the cases.
    """
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def fisher_accumulate(fisher: Tensor, grad: Tensor, weight: Scalar) -> None:
    """Add weight * grad * grad to fisher."""
    for _, (f, g) in _chunks(fisher, grad):
        g32 = g.float()
        f.copy_(f + weight * g32 * g32)


def fisher_penalty(grad: Tensor, param: Tensor, anchor: Tensor, fisher: Tensor | None, strength: Scalar) -> Tensor:
    """Add strength * fisher * (param - anchor) to grad; return the penalty loss."""
    total = torch.zeros((), dtype=torch.float64, device=grad.device)
    for _, (g, p, a, f) in _chunks(grad, param, anchor, fisher):
        distance = p.float() - a.float()
        pull = _stiffness(f, strength) * distance
        g.copy_(g.float() + pull)
        total += (pull * distance).sum(dtype=torch.float64)
    return (0.5 * total).float()


def penalized_grad_norm(
    grad: Tensor,
    param: Tensor | None,
    anchor: Tensor | None,
    fisher: Tensor | None,
    strength: Scalar,
    grad_mult: Scalar,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """Return (sum (grad_mult * grad + strength F (p - a))^2, penalty loss), fp64."""
    square, total = torch.zeros((2,), dtype=torch.float64, device=grad.device).unbind()
    for start, (g, p, a, f) in _chunks(grad, param, anchor, fisher):
        h = grad_mult * g.float()
        if a is not None:
            distance = p.float() - a.float()
            pull = _stiffness(f, _per_element(strength, segments, "strength", start, g.numel())) * distance
            h = h + pull
            total += (pull * distance).sum(dtype=torch.float64)
        square += (h * h).sum(dtype=torch.float64)
    return square, 0.5 * total


def adamw_step(call: AdamWArguments) -> Tensor | None:
    """Do the step of `adamw_step_` chunk by chunk; return the penalty loss or None."""
    total = torch.zeros((), dtype=torch.float64, device=call.param.device)
    buffers = (call.param, call.grad, call.exp_avg, call.exp_avg_sq, call.anchor, call.fisher, call.ema, call.param_out)
    for start, chunk in _chunks(*buffers):
        total += _step_chunk(call, start, *chunk)
    return None if call.anchor is None else (0.5 * total).float()


def _step_chunk(
    call: AdamWArguments,
    start: int,
    p: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    anchor: Tensor | None,
    fisher: Tensor | None,
    ema: Tensor | None,
    out: Tensor | None,
) -> Tensor | float:
    """Step one chunk; return sum strength F d^2 over it, in fp64."""
    c, n = call.coef, p.numel()
    strength = _per_element(c.strength, call.segments, "strength", start, n)
    decay = _per_element(c.weight_decay, call.segments, "weight_decay", start, n, scale=c.lr)
    g = c.grad * grad.float()
    twice_loss: Tensor | float = 0.0
    if anchor is not None:
        stiffness, distance = _stiffness(fisher, strength), p - anchor.float()
        pull = stiffness * distance
        twice_loss = (pull * distance).sum(dtype=torch.float64)
        g = g if call.proximal else g + pull
    new_m = c.beta1 * m + (1.0 - c.beta1) * g
    new_v = c.beta2 * v + (1.0 - c.beta2) * g * g
    update = c.step_size * new_m / (new_v.sqrt() * c.inv_sqrt_correction2 + c.eps)
    new_p = p - (decay * p + update)
    if anchor is not None and call.proximal:
        new_p = _proximal(new_p, anchor.float(), c.lr * stiffness)
    if not call.frozen:
        new_ema = None if ema is None else ema + _ema_rate(call, fisher) * (new_p - ema)
        for old, new in ((p, new_p), (m, new_m), (v, new_v), (ema, new_ema), (out, new_p)):
            _write(old, new, call.found_inf)
        if call.nonfinite is not None:
            _count(call.nonfinite, call.found_inf, new_p, new_v, new_ema)
    return twice_loss


def _stiffness(fisher: Tensor | None, strength: Scalar) -> Tensor:
    """Return strength F, the spring constant of the penalty per element; 0-dim if all elements share one."""
    return torch.as_tensor(strength, dtype=torch.float32) if fisher is None else strength * fisher.float()


def _ema_rate(call: AdamWArguments, fisher: Tensor | None) -> Scalar:
    """Return 1 - decay of the average: one for all elements, or one of two according to the element's Fisher."""
    c = call.coef
    if not call.ema_by_fisher:
        return c.ema_rate
    assert fisher is not None
    above, below = (
        torch.as_tensor(rate, dtype=torch.float32, device=fisher.device) for rate in (c.ema_rate_above, c.ema_rate)
    )
    threshold = torch.as_tensor(c.ema_threshold, dtype=torch.float32, device=fisher.device)
    return torch.where(fisher.float() > threshold, above, below)


def _proximal(p: Tensor, anchor: Tensor, weight: Tensor) -> Tensor:
    """Return argmin_q 1/2 |q - p|^2 + weight/2 (q - a)^2 with weight = lr strength F, accurate from 1e-12 to 1e38."""
    weight = weight.clamp(max=1e37)  # avoids inf / inf and keeps NaN
    return p - weight / (1.0 + weight) * (p - anchor)


def _write(old: Tensor | None, new: Tensor | None, found_inf: Tensor | None) -> None:
    if old is None or new is None:
        return
    old.copy_(new if found_inf is None else torch.where(found_inf != 0, old, new.to(old.dtype)))


def _count(total: Tensor, found_inf: Tensor | None, *written: Tensor | None) -> None:
    """Add the number of elements of which one of the written values is not finite."""
    finite = [values.isfinite() for values in written if values is not None]
    count = torch.stack(finite).all(0).logical_not().sum()
    total.add_(count if found_inf is None else torch.where(found_inf != 0, 0, count))


def _per_element(
    scalar: Scalar, segments: Segments | None, column: str, start: int, n: int, scale: Scalar = 1.0
) -> Scalar:
    """Return the scalar, or the segments' column per element of [start, start + n), multiplied by `scale`."""
    values: Tensor | None = None if segments is None else getattr(segments, column)
    if segments is None or values is None:
        return scalar
    index = torch.arange(start, start + n, device=values.device, dtype=torch.int64)
    which = torch.searchsorted(segments.offsets, index, right=True) - 1
    return scale * values[which.clamp(0, values.numel() - 1)]


# The slices are Any because only the caller knows which of its buffers may be None.
def _chunks(first: Tensor, *others: Tensor | None) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Yield (start, slices) of all buffers as flat views; None stays None."""
    flat = [None if t is None else t.detach().view(-1) for t in (first, *others)]
    size = CHUNK.get(first.device.type, 1 << 20)
    for start in range(0, first.numel(), size):
        yield start, tuple(None if t is None else t[start : start + size] for t in flat)
