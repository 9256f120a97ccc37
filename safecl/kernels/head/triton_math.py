"""Arithmetic of the head's Triton kernels on one block: logit shapes, running log-sums, and terms of the divergences.

A block is [lanes, VECTOR], with VECTOR neighbours in one thread. Maxima and sums run per lane, in registers, and the
lanes are joined once per row; a block that reduced over all threads would wait at six barriers per statistic. Exponents
are in base 2, which is what the hardware computes.
"""

from __future__ import annotations

import triton
import triton.language as tl

FORWARD_KL, REVERSE_KL, JSD, MSE = (tl.constexpr(code) for code in (1, 2, 3, 4))
# The steps between the product and the logits; CAPPED includes the scale.
SCALED, CAPPED = tl.constexpr(1), tl.constexpr(2)
VECTOR = tl.constexpr(8)
LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # a finite start of the running maximum: -inf - -inf would be NaN
NEAR = tl.constexpr(0.3)  # log-ratios below it use the series


@triton.jit
def exp_excess(r):
    """Return e^r - 1 - r for |r| < NEAR, to fp32."""
    return r * r * (1 / 2 + r * (1 / 6 + r * (1 / 24 + r * (1 / 120 + r * (1 / 720 + r / 5040)))))


@triton.jit
def log1p_series(x):
    """Return log(1 + x) = 2 atanh(s) to fp32 for |x| < 0.4; near 1 the hardware's log has an absolute error of 2e-7."""
    s = x / (2 + x)
    s2 = s * s
    return 2 * s * (1 + s2 * (1 / 3 + s2 * (1 / 5 + s2 * (1 / 7 + s2 / 9))))


@triton.jit
def tanh(x):
    r = -2 * tl.abs(x)
    e = tl.where(r > -NEAR, r + exp_excess(r), tl.exp(r) - 1)
    return tl.where(x < 0, e, -e) / (2 + e)


@triton.jit
def shape_logits(raw, scale, cap, SHAPE: tl.constexpr):
    """Return cap·tanh(scale·raw / cap), or the part of it that SHAPE asks for, in fp32; -inf stays -inf."""
    z = raw.to(tl.float32)
    if SHAPE != 0:
        z = z * scale
    if SHAPE == CAPPED:
        z = tl.where(z == -float("inf"), z, cap * tanh(z / cap))
    return z


@triton.jit
def shape_backward(grad, z, scale, cap, SHAPE: tl.constexpr):
    if SHAPE == CAPPED:
        grad = tl.where(z == -float("inf"), 0.0, grad * (1 - (z / cap) * (z / cap)))
    if SHAPE != 0:
        grad = grad * scale
    return grad


@triton.jit
def columns(start, BLOCK: tl.constexpr):
    """Return the columns of one block [BLOCK / VECTOR, VECTOR], with neighbours in one thread."""
    lanes = tl.arange(0, BLOCK // VECTOR)
    return start + lanes[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def empty_sum(BLOCK: tl.constexpr):
    """Return (peak, total) of every lane before the first block."""
    return tl.full([BLOCK // VECTOR], LOWEST, tl.float32), tl.zeros([BLOCK // VECTOR], tl.float32)


@triton.jit
def add_to_sum(peak, total, x):
    """Update the maximum and the sum of 2^(x - maximum) of every lane; x: [lanes, VECTOR], base-2 exponents."""
    new = tl.maximum(peak, tl.max(x, 1))
    return new, total * tl.exp2(peak - new) + tl.sum(tl.exp2(x - new[:, None]), 1)


@triton.jit
def finish_sum(peak, total):
    """Return log2 of the sum over all lanes of total·2^peak."""
    top = tl.max(peak, 0)
    return top + tl.log2(tl.sum(total * tl.exp2(peak - top), 0))


@triton.jit
def log_sum_of(x):
    """Return log2 of the sum of 2^x over a few exponents."""
    peak = tl.maximum(x, LOWEST)
    return finish_sum(peak, tl.where(x > LOWEST, 1.0, 0.0))


@triton.jit
def log_add(a, b):
    """Return log2(2^a + 2^b)."""
    high, low = tl.maximum(a, b), tl.minimum(a, b)
    x = tl.exp2(low - high)
    sum_log = tl.where(x < NEAR, log1p_series(x), tl.log(1 + x)) * LOG2_E
    return tl.where(low == -float("inf"), high, high + sum_log)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def finite_log_ratio(r):
    """Return the log-ratio for a gradient: 0 for 0 / 0, a large number for an infinite one."""
    return tl.where(is_finite(r), r, tl.where(r > 0, 100.0, tl.where(r < 0, -100.0, 0.0)))


@triton.jit
def event_terms(log_p, log_q, p, q, r, beta, DIVERGENCE: tl.constexpr):
    """Return (loss term >= 0, p·g) of one event, with r = log q - log p.

    For forward_kl the second is p - q, which is the gradient where q sums to 1. Below NEAR both follow from p and r
    alone, without a difference of close numbers: with h = e^r - 1 - r, q - p = p (r + h).
    """
    near = tl.abs(r) < NEAR
    h = exp_excess(r)
    e = r + h
    gap = tl.where(near, p * e, q - p)
    if DIVERGENCE == FORWARD_KL:
        mass = tl.where(near, gap, q)
        term = tl.where(mass == 0, 0.0, mass * r) - tl.where(near, p * h, gap)
        p_grad = -gap
    elif DIVERGENCE == REVERSE_KL:
        term = tl.where(near, p * h, gap - tl.where(p > 0, p * r, 0.0))
        p_grad = -p * finite_log_ratio(r)
    else:
        near_p = -log1p_series(beta * e)
        log_m = tl.log(beta * q + (1 - beta) * p)
        p_grad = (1 - beta) * tl.where(p > 0, p * tl.where(near, near_p, log_p - log_m), 0.0)
        term = beta * tl.where(q > 0, q * tl.where(near, r + near_p, log_q - log_m), 0.0) + p_grad
    return term, p_grad


@triton.jit
def event(log_p, log_q, beta, DIVERGENCE: tl.constexpr):
    """Return (loss term, p, p·g) of one of k + 1 events; for forward_kl p·g is -q."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    term, p_grad = event_terms(log_p, log_q, p, q, log_q - log_p, beta, DIVERGENCE)
    if DIVERGENCE == FORWARD_KL:
        p_grad = -q
    return term, p, p_grad


@triton.jit
def truncated_event(log_p, log_q, beta, DIVERGENCE: tl.constexpr):
    """Return the same for the plain sum, over events that are a part of the support."""
    p, q, r = tl.exp(log_p), tl.exp(log_q), log_q - log_p
    if DIVERGENCE == FORWARD_KL:
        term, p_grad = tl.where(q > 0, q * r, 0.0), -q
    elif DIVERGENCE == REVERSE_KL:
        term, p_grad = tl.where(p > 0, -p * r, 0.0), p * (1 - finite_log_ratio(r))
    else:
        term, p_grad = event_terms(log_p, log_q, p, q, r, beta, DIVERGENCE)  # its sum equals the plain one
    return term, p, p_grad


@triton.jit
def dense_terms(z, y, lse_s, lse_t, inverse_t, beta, DIVERGENCE: tl.constexpr):
    """Return (loss terms, p, p·g) of a block; lse_s, lse_t: base 2.

    The log-ratio is formed from the gap of the logits, which keeps its digits.
    """
    log_p, log_q = z * (inverse_t * LOG2_E) - lse_s, y * (inverse_t * LOG2_E) - lse_t
    p, q = tl.exp2(log_p), tl.exp2(log_q)
    r = (y - z) * inverse_t - (lse_t - lse_s) * LN_2
    term, p_grad = event_terms(log_p * LN_2, log_q * LN_2, p, q, r, beta, DIVERGENCE)
    return term, p, p_grad
