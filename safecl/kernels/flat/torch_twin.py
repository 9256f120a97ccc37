"""The flat family in plain torch: the definition that the Triton and C++ kernels are held to, and the fallback where
neither runs.

Works through the buffers in chunks, so the temporaries stay in the cache and far below 1 % of a shard. The order of the
operations is the kernels' own, one rounding each, so that the elements agree bitwise with the other back ends' (but for
sqrt: torch's CPU sqrt is MKL's, which is an ulp off now and then).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from safecl.kernels.flat.arguments import AdamWArguments, Scalar, Segments

CHUNK = {
    "cpu": 1 << 15,
    "cuda": 1 << 22,
}  # elements: temporaries of a chunk fit the L2 cache of a core; a GPU needs longer launches


def ema_update(ema: Tensor, param: Tensor, rate: Scalar, seed: Tensor | None) -> None:
    """ema += rate * (param - ema); a bf16 ema is rounded stochastically from `seed`."""
    for start, (e, p) in _chunks(ema, param):
        e32 = e.float()
        new = e32 + rate * (p.float() - e32)
        e.copy_(new if seed is None else stochastic_bf16(new, seed, start))


def stochastic_bf16(values: Tensor, seed: Tensor, start: int) -> Tensor:
    """fp32 -> bf16, up with probability (value - lower) / (upper - lower): 16 random bits are added below its mantissa,
    then cut off."""
    index = torch.arange(start, start + values.numel(), device=values.device, dtype=torch.int64)
    noise = random_words(index, seed) >> 16
    bits = values.view(torch.int32).to(torch.int64)
    rounded = ((bits + noise) >> 16 << 16).to(torch.int32).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def random_words(index: Tensor, seed: Tensor) -> Tensor:
    """A uniform 32-bit word (in int64) for each element index: a counter-based hash, so that every back end draws the
    same numbers."""
    low, high = index & 0xFFFFFFFF, index >> 32
    return _mix((_mix(low ^ seed[0]) + seed[1] + high * 0x9E3779B9) & 0xFFFFFFFF)


def _mix(x: Tensor) -> Tensor:
    """32-bit finaliser "lowbias32" (C. Wellons, hash-prospector): each input bit flips each output bit about half of
    the time."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def fisher_accumulate(fisher: Tensor, grad: Tensor, weight: Scalar) -> None:
    """fisher += weight * grad * grad."""
    for _, (f, g) in _chunks(fisher, grad):
        g32 = g.float()
        f.copy_(f + weight * g32 * g32)


def fisher_penalty(grad: Tensor, param: Tensor, anchor: Tensor, fisher: Tensor | None, strength: Scalar) -> Tensor:
    """grad += strength * fisher * (param - anchor); returns the penalty."""
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
    """(sum (grad_mult * grad + strength F (p - a))^2, penalty), fp64."""
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
    """The step of `flat.adamw_step_`, chunk by chunk; returns the penalty loss or None."""
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
    """Step one chunk; returns sum strength F d^2 over it, in fp64."""
    c, n = call.coef, p.numel()
    strength = _per_element(c.strength, call.segments, "strength", start, n)
    decay = _per_element(c.weight_decay, call.segments, "weight_decay", start, n, scale=c.lr)
    g, twice_loss = c.grad * grad.float(), 0.0
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
    return twice_loss


def _stiffness(fisher: Tensor | None, strength: Scalar) -> Tensor:
    """strength F, the penalty's spring constant at each element (0-dim where it is the same at all)."""
    return torch.as_tensor(strength, dtype=torch.float32) if fisher is None else strength * fisher.float()


def _ema_rate(call: AdamWArguments, fisher: Tensor | None) -> Scalar:
    """1 - decay of the average: one for all elements, or one of two by the element's Fisher."""
    c = call.coef
    if not call.ema_by_fisher:
        return c.ema_rate
    above, below = (
        torch.as_tensor(rate, dtype=torch.float32, device=fisher.device) for rate in (c.ema_rate_above, c.ema_rate)
    )
    threshold = torch.as_tensor(c.ema_threshold, dtype=torch.float32, device=fisher.device)
    return torch.where(fisher.float() > threshold, above, below)


def _proximal(p: Tensor, anchor: Tensor, weight: Tensor) -> Tensor:
    """argmin_q 1/2 |q - p|^2 + weight/2 (q - a)^2 with weight = lr strength F, written so that neither 1e-12 nor 1e38
    loses it."""
    weight = weight.clamp(max=1e37)  # keeps inf / inf away and NaN in
    return p - weight / (1.0 + weight) * (p - anchor)


def _write(old: Tensor | None, new: Tensor | None, found_inf: Tensor | None) -> None:
    if old is None or new is None:
        return
    old.copy_(new if found_inf is None else torch.where(found_inf != 0, old, new.to(old.dtype)))


def _per_element(
    scalar: Scalar, segments: Segments | None, column: str, start: int, n: int, scale: Scalar = 1.0
) -> Scalar:
    """The scalar, or the segments' column spread over elements [start, start + n) and multiplied by `scale`."""
    values = None if segments is None else getattr(segments, column)
    if values is None:
        return scalar
    index = torch.arange(start, start + n, device=values.device, dtype=torch.int64)
    which = torch.searchsorted(segments.offsets, index, right=True) - 1
    return scale * values[which.clamp(0, values.numel() - 1)]


def _chunks(first: Tensor, *others: Tensor | None) -> Iterator[tuple[int, tuple]]:
    """(start, slices) of all buffers as flat views, None staying None."""
    flat = [None if t is None else t.detach().view(-1) for t in (first, *others)]
    size = CHUNK.get(first.device.type, 1 << 20)
    for start in range(0, first.numel(), size):
        yield start, tuple(None if t is None else t[start : start + size] for t in flat)
