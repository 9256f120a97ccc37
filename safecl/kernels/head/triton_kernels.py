"""The row work of the distillation head in Triton: the functions of ``divergences.py``, same names, signatures and
formulas.

One program walks one row in blocks, so the width of the vocabulary costs no registers. Passes over the fp32 tile, in
bytes per logit with a dense teacher and bf16 dlogits:

    1  online maximum and sum of the student (at 1 and at T) and of the teacher at T     8
    2  forward_kl, mse, cross-entropy: loss and gradient                                 8 + 2
    3  reverse_kl, jsd: pass 2 finds the loss and E = sum p g, pass 3 the gradient       8 + 8 + 2

A block is [lanes, 8], eight neighbours per thread. Maxima and sums run per lane, in registers, and the lanes meet once
per row; a block that reduced over all threads would wait at six barriers per statistic. Exponents are kept in base 2,
which is what the hardware computes.

Against a top-k teacher the k student logits are gathered and replaced by -inf first, so that pass 1 sums the rest by
itself (a tail formed as 1 - sum is noise) and pass 2 leaves them alone; the k events live in registers and their
gradients are scattered last.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from safecl.kernels.head import divergences, torch_twin
from safecl.kernels.head.backend import RowLosses, RowOptions

BLOCK, NUM_WARPS = 2048, 8
# Registers per thread that let three or two programs of eight warps share a multiprocessor. Left to itself the
# assembler spills for more.
LEAN, WIDE = 80, 128
MAX_EVENTS = 512  # beyond it the k events spill out of the registers
FORWARD_KL, REVERSE_KL, JSD, MSE = (tl.constexpr(code) for code in (1, 2, 3, 4))
TRUNCATED, RENORMALISED = tl.constexpr(1), tl.constexpr(2)
SCALED, CAPPED = (
    tl.constexpr(1),
    tl.constexpr(2),
)  # what lies between the product and the logits; CAPPED includes the scale
VECTOR = tl.constexpr(8)
LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # a finite start of the running maximum: -inf - -inf would be NaN
NEAR = tl.constexpr(0.3)  # log-ratios below it take the series
_CODES = {"forward_kl": 1, "reverse_kl": 2, "jsd": 3, "mse": 4}
_MODES = {"tail": 0, "truncated": 1, "renormalised": 2}


@triton.jit
def _exp_excess(r):
    """e^r - 1 - r for |r| < NEAR, to fp32."""
    return r * r * (1 / 2 + r * (1 / 6 + r * (1 / 24 + r * (1 / 120 + r * (1 / 720 + r / 5040)))))


@triton.jit
def _log1p_series(x):
    # log(1 + x) = 2 atanh(s), to fp32 for |x| < 0.4; the hardware's logarithm has an absolute error of 2e-7 around 1
    s = x / (2 + x)
    s2 = s * s
    return 2 * s * (1 + s2 * (1 / 3 + s2 * (1 / 5 + s2 * (1 / 7 + s2 / 9))))


@triton.jit
def _tanh(x):
    r = -2 * tl.abs(x)
    e = tl.where(r > -NEAR, r + _exp_excess(r), tl.exp(r) - 1)
    return tl.where(x < 0, e, -e) / (2 + e)


@triton.jit
def _shape(raw, scale, cap, SHAPE: tl.constexpr):
    z = raw.to(tl.float32)
    if SHAPE != 0:
        z = z * scale
    if SHAPE == CAPPED:
        z = tl.where(z == -float("inf"), z, cap * _tanh(z / cap))
    return z


@triton.jit
def _shape_backward(grad, z, scale, cap, SHAPE: tl.constexpr):
    if SHAPE == CAPPED:
        grad = tl.where(z == -float("inf"), 0.0, grad * (1 - (z / cap) * (z / cap)))
    if SHAPE != 0:
        grad = grad * scale
    return grad


@triton.jit
def _columns(start, BLOCK: tl.constexpr):
    """[BLOCK / VECTOR, VECTOR]: the columns of one block, neighbours in one thread."""
    lanes = tl.arange(0, BLOCK // VECTOR)
    return start + lanes[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _no_logits(BLOCK: tl.constexpr):
    """(peak, total) of every lane before the first block."""
    return tl.full([BLOCK // VECTOR], LOWEST, tl.float32), tl.zeros([BLOCK // VECTOR], tl.float32)


@triton.jit
def _online(peak, total, x):
    """Running maximum and sum of 2^(x - maximum) of every lane; x: [lanes, VECTOR], base-2 exponents."""
    new = tl.maximum(peak, tl.max(x, 1))
    return new, total * tl.exp2(peak - new) + tl.sum(tl.exp2(x - new[:, None]), 1)


@triton.jit
def _finish(peak, total):
    """log2 of the sum over all lanes of total·2^peak."""
    top = tl.max(peak, 0)
    return top + tl.log2(tl.sum(total * tl.exp2(peak - top), 0))


@triton.jit
def _log_sum(x):
    """logsumexp of a few base-2 exponents, in base 2."""
    peak = tl.maximum(x, LOWEST)
    return _finish(peak, tl.where(x > LOWEST, 1.0, 0.0))


@triton.jit
def _logaddexp(a, b):
    """Of base-2 exponents, in base 2."""
    high, low = tl.maximum(a, b), tl.minimum(a, b)
    x = tl.exp2(low - high)
    sum_log = tl.where(x < NEAR, _log1p_series(x), tl.log(1 + x)) * LOG2_E
    return tl.where(low == -float("inf"), high, high + sum_log)


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _finite(r):
    """The log-ratio inside gradients: 0 for 0 / 0, a large number for an infinite one."""
    return tl.where(_is_finite(r), r, tl.where(r > 0, 100.0, tl.where(r < 0, -100.0, 0.0)))


@triton.jit
def _terms(log_p, log_q, p, q, r, beta, DIVERGENCE: tl.constexpr):
    """(loss term >= 0, p·g) of one event, r = log q - log p. For forward_kl the second is p - q, the gradient where q
    sums to 1.

    Below NEAR everything follows from p and r alone, without a difference of neighbours: with h = e^r - 1 - r, q - p =
    p (r + h).
    """
    near = tl.abs(r) < NEAR
    h = _exp_excess(r)
    e = r + h
    gap = tl.where(near, p * e, q - p)
    if DIVERGENCE == FORWARD_KL:
        mass = tl.where(near, gap, q)
        term = tl.where(mass == 0, 0.0, mass * r) - tl.where(near, p * h, gap)
        p_grad = -gap
    elif DIVERGENCE == REVERSE_KL:
        term = tl.where(near, p * h, gap - tl.where(p > 0, p * r, 0.0))
        p_grad = -p * _finite(r)
    else:
        near_p = -_log1p_series(beta * e)
        log_m = tl.log(beta * q + (1 - beta) * p)
        p_grad = (1 - beta) * tl.where(p > 0, p * tl.where(near, near_p, log_p - log_m), 0.0)
        term = beta * tl.where(q > 0, q * tl.where(near, r + near_p, log_q - log_m), 0.0) + p_grad
    return term, p_grad


@triton.jit
def _event(log_p, log_q, beta, DIVERGENCE: tl.constexpr):
    """(loss term, p, p·g) of one of k + 1 events; for forward_kl p·g is -q."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    term, p_grad = _terms(log_p, log_q, p, q, log_q - log_p, beta, DIVERGENCE)
    if DIVERGENCE == FORWARD_KL:
        p_grad = -q
    return term, p, p_grad


@triton.jit
def _truncated_event(log_p, log_q, beta, DIVERGENCE: tl.constexpr):
    """The same with the plain sum, for events that are a part of the support."""
    p, q, r = tl.exp(log_p), tl.exp(log_q), log_q - log_p
    if DIVERGENCE == FORWARD_KL:
        term, p_grad = tl.where(q > 0, q * r, 0.0), -q
    elif DIVERGENCE == REVERSE_KL:
        term, p_grad = tl.where(p > 0, -p * r, 0.0), p * (1 - _finite(r))
    else:
        term, p_grad = _terms(log_p, log_q, p, q, r, beta, DIVERGENCE)  # its sum has nothing beyond the plain one
    return term, p, p_grad


@triton.jit
def _logits(pointer, cols, width, scale, cap, SHAPE: tl.constexpr):
    """A block of shaped logits; -inf beyond the width."""
    return _shape(tl.load(pointer + cols, mask=cols < width, other=-float("inf")), scale, cap, SHAPE)


@triton.jit
def _up_to(s, cols, shared, SAME_WIDTH: tl.constexpr):
    """The student's logits over the shared vocabulary."""
    if not SAME_WIDTH:
        s = tl.where(cols < shared, s, -float("inf"))
    return s


@triton.jit
def _statistics(
    student,
    teacher,
    vocab,
    shared,
    inverse_t,
    scale,
    cap,
    t_scale,
    t_cap,
    DIVERGENCE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    SHAPE: tl.constexpr,
    T_SHAPE: tl.constexpr,
    SAME_WIDTH: tl.constexpr,
    SAME: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pass 1: log2-sum-exp of the student at 1 and at T and of the teacher at T; sum and count of the logit gaps for
    mse."""
    peak_1, total_1 = _no_logits(BLOCK)
    peak_s, total_s = _no_logits(BLOCK)
    peak_t, total_t = _no_logits(BLOCK)
    gap_sum, gap_count = tl.zeros([BLOCK // VECTOR], tl.float32), tl.zeros([BLOCK // VECTOR], tl.float32)
    to_base_2 = inverse_t * LOG2_E
    for start in range(0, vocab, BLOCK):
        cols = _columns(start, BLOCK)
        s = _logits(student, cols, vocab, scale, cap, SHAPE)
        if HAS_LABELS:
            peak_1, total_1 = _online(peak_1, total_1, s * LOG2_E)
        if DIVERGENCE != 0:
            y = _logits(teacher, cols, shared, t_scale, t_cap, T_SHAPE)
            z = _up_to(s, cols, shared, SAME_WIDTH)
            if DIVERGENCE == MSE:
                gap = (z - y) * inverse_t
                valid = _is_finite(gap)
                gap_sum += tl.sum(tl.where(valid, gap, 0.0), 1)
                gap_count += tl.sum(valid.to(tl.float32), 1)
            else:
                peak_t, total_t = _online(peak_t, total_t, y * to_base_2)
                if not (SAME and HAS_LABELS):
                    peak_s, total_s = _online(peak_s, total_s, z * to_base_2)
    lse_1, lse_s = _finish(peak_1, total_1), _finish(peak_s, total_s)
    if SAME and HAS_LABELS:
        lse_s = lse_1
    return lse_1, lse_s, _finish(peak_t, total_t), tl.sum(gap_sum, 0), tl.sum(gap_count, 0)


@triton.jit
def _dense_terms(z, y, lse_s, lse_t, inverse_t, beta, DIVERGENCE: tl.constexpr):
    """(loss terms, p, p·g) of a block; lse_s, lse_t: base 2. The log-ratio is formed from the gap of the logits, so it
    keeps its digits."""
    log_p, log_q = z * (inverse_t * LOG2_E) - lse_s, y * (inverse_t * LOG2_E) - lse_t
    p, q = tl.exp2(log_p), tl.exp2(log_q)
    r = (y - z) * inverse_t - (lse_t - lse_s) * LN_2
    term, p_grad = _terms(log_p * LN_2, log_q * LN_2, p, q, r, beta, DIVERGENCE)
    return term, p, p_grad


@triton.jit
def _read_label(labels, ce_weights, row):
    """(label or -1, weight or 0, whether there is one)."""
    label = tl.load(labels + row).to(tl.int32)
    weight = tl.load(ce_weights + row)
    has_label = (label >= 0) & (weight != 0)
    return tl.where(has_label, label, -1), tl.where(has_label, weight, 0.0), has_label


@triton.jit(do_not_specialize=["rows"])
def dense_rows_kernel(
    student,
    student_stride,
    teacher,
    teacher_stride,
    dlogits,
    dlogits_stride,
    labels,
    ce_weights,
    kd_weights,
    losses,
    rows,
    vocab,
    shared,
    inverse_t,
    beta,
    kd_scale,
    z_loss,
    scale,
    cap,
    t_scale,
    t_cap,
    DIVERGENCE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    SHAPE: tl.constexpr,
    T_SHAPE: tl.constexpr,
    SAME_WIDTH: tl.constexpr,
    SAME: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row. losses: [3, rows]. DIVERGENCE 0: no teacher. SAME_WIDTH: shared == vocab. SAME: and T is 1, so one
    softmax serves both."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    dlogits += row * dlogits_stride
    lse_1, lse_s, lse_t, mean_gap, count = _statistics(
        student, teacher, vocab, shared, inverse_t, scale, cap, t_scale, t_cap,
        DIVERGENCE, HAS_LABELS, SHAPE, T_SHAPE, SAME_WIDTH, SAME, BLOCK,
    )  # fmt: skip
    label, ce_weight, ce_factor = -1, 0.0, 0.0
    if HAS_LABELS:
        label, ce_weight, has_label = _read_label(labels, ce_weights, row)
        at_label = _shape(tl.load(student + tl.where(has_label, label, 0)), scale, cap, SHAPE)
        logsumexp = tl.where(has_label, lse_1 * LN_2, 0.0)
        ce_factor = ce_weight * (1 + 2 * z_loss * logsumexp)
        tl.store(losses + row, tl.where(has_label, logsumexp - at_label, 0.0))
        tl.store(losses + 2 * rows + row, logsumexp)
        tl.debug_barrier()  # dlogits may be the tile itself: no warp may write before every warp has read the label's logit
    kd_factor, expected = 0.0, 0.0
    kd_lanes, expected_lanes = tl.zeros([BLOCK // VECTOR], tl.float32), tl.zeros([BLOCK // VECTOR], tl.float32)
    if DIVERGENCE != 0:
        kd_factor = tl.load(kd_weights + row) * kd_scale * inverse_t
    if DIVERGENCE == MSE:
        count = tl.maximum(count, 1.0)
        mean_gap = mean_gap / count
        kd_factor = kd_factor * 2 / count
    if DIVERGENCE == REVERSE_KL or DIVERGENCE == JSD:
        for start in range(0, shared, BLOCK):
            cols = _columns(start, BLOCK)
            z = _logits(student, cols, shared, scale, cap, SHAPE)
            y = _logits(teacher, cols, shared, t_scale, t_cap, T_SHAPE)
            term, p, p_grad = _dense_terms(z, y, lse_s, lse_t, inverse_t, beta, DIVERGENCE)
            kd_lanes += tl.sum(term, 1)
            expected_lanes += tl.sum(p_grad, 1)
        expected = tl.sum(expected_lanes, 0)
    if NEEDS_GRAD or DIVERGENCE == FORWARD_KL or DIVERGENCE == MSE:
        for start in range(0, vocab, BLOCK):
            cols = _columns(start, BLOCK)
            s = _logits(student, cols, vocab, scale, cap, SHAPE)
            grad = tl.zeros_like(s)
            if DIVERGENCE != 0:
                y = _logits(teacher, cols, shared, t_scale, t_cap, T_SHAPE)
                z = _up_to(s, cols, shared, SAME_WIDTH)
                if DIVERGENCE == MSE:
                    gap = (z - y) * inverse_t
                    kd_grad = tl.where(_is_finite(gap), gap - mean_gap, 0.0)
                    kd_lanes += tl.sum(kd_grad * kd_grad, 1)
                else:
                    term, p, kd_grad = _dense_terms(z, y, lse_s, lse_t, inverse_t, beta, DIVERGENCE)
                    if DIVERGENCE == FORWARD_KL:
                        kd_lanes += tl.sum(term, 1)
                    else:
                        kd_grad -= p * expected
                grad = kd_factor * kd_grad
            if HAS_LABELS:
                if SAME and DIVERGENCE != 0 and DIVERGENCE != MSE:
                    p_1 = p
                else:
                    p_1 = tl.exp2(s * LOG2_E - lse_1)
                grad += ce_factor * p_1 - tl.where(cols == label, ce_weight, 0.0)
            if NEEDS_GRAD:
                grad = _shape_backward(grad, s, scale, cap, SHAPE)
                tl.store(dlogits + cols, grad.to(dlogits.dtype.element_ty), mask=cols < vocab)
    if DIVERGENCE != 0:
        kd = tl.maximum(tl.sum(kd_lanes, 0), 0.0)
        if DIVERGENCE == MSE:
            kd = kd / count
        tl.store(losses + rows + row, kd * kd_scale)


@triton.jit
def _topk_events(z_top, q_top, used, lse_k, lse_rest, log_tail, beta, DIVERGENCE: tl.constexpr, MODE: tl.constexpr):
    """(loss, gradient of the k stored tokens [BLOCK_K], gradient of all the others together); natural logarithms, lse
    in base 2."""
    rest_grad = 0.0
    lse = _logaddexp(lse_k, lse_rest) * LN_2
    rest = lse_rest * LN_2
    if DIVERGENCE == MSE:
        gap = z_top - q_top
        valid = used & _is_finite(gap)
        count = tl.maximum(tl.sum(valid.to(tl.float32), 0), 1.0)
        grad = tl.where(valid, gap - tl.sum(tl.where(valid, gap, 0.0), 0) / count, 0.0)
        loss = tl.sum(grad * grad, 0) / count
        grad = grad * 2 / count
    elif MODE == RENORMALISED:
        lse_q = _log_sum(q_top * LOG2_E)
        term, p, grad = _dense_terms(z_top, q_top, lse_k, lse_q, 1.0, beta, DIVERGENCE)
        loss = tl.maximum(tl.sum(tl.where(used, term, 0.0), 0), 0.0)
        if DIVERGENCE != FORWARD_KL:
            grad -= p * tl.sum(tl.where(used, grad, 0.0), 0)
    elif MODE == TRUNCATED:
        term, p, grad = _truncated_event(z_top - lse, q_top, beta, DIVERGENCE)
        loss = tl.sum(tl.where(used, term, 0.0), 0)
        expected = tl.sum(tl.where(used, grad, 0.0), 0)
        grad -= p * expected
        rest_grad = -tl.exp(rest - lse) * expected
    else:
        term, p, grad = _event(z_top - lse, q_top, beta, DIVERGENCE)
        tail_term, p_tail, tail_grad = _event(rest - lse, log_tail, beta, DIVERGENCE)
        loss = tl.maximum(tl.sum(tl.where(used, term, 0.0), 0) + tail_term, 0.0)
        expected = tl.sum(tl.where(used, grad, 0.0), 0) + tail_grad
        grad -= p * expected
        rest_grad = tail_grad - p_tail * expected
    return loss, grad, rest_grad


@triton.jit
def _rest_statistics(
    student, vocab, inverse_t, scale, cap, SHAPE: tl.constexpr, SEPARATE: tl.constexpr, BLOCK: tl.constexpr
):
    """log2-sum-exp of a row at 1 and at T. SEPARATE: both are needed and differ; else the first equals the second."""
    peak_1, total_1 = _no_logits(BLOCK)
    peak_t, total_t = _no_logits(BLOCK)
    for start in range(0, vocab, BLOCK):
        s = _logits(student, _columns(start, BLOCK), vocab, scale, cap, SHAPE)
        peak_t, total_t = _online(peak_t, total_t, s * (inverse_t * LOG2_E))
        if SEPARATE:
            peak_1, total_1 = _online(peak_1, total_1, s * LOG2_E)
    at_t = _finish(peak_t, total_t)
    at_1 = at_t
    if SEPARATE:
        at_1 = _finish(peak_1, total_1)
    return at_1, at_t


@triton.jit(do_not_specialize=["rows"])
def topk_rows_kernel(
    student,
    student_stride,
    dlogits,
    dlogits_stride,
    top,
    top_grad,
    log_q,
    indices,
    log_tail,
    labels,
    ce_weights,
    kd_weights,
    losses,
    rows,
    vocab,
    k,
    inverse_t,
    beta,
    kd_scale,
    z_loss,
    scale,
    cap,
    DIVERGENCE: tl.constexpr,
    MODE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    SHAPE: tl.constexpr,
    SAME: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row whose k stored tokens are -inf in ``student`` and raw in ``top`` [rows, k]; their gradients go to
    ``top_grad`` [rows, k].

    SAME: T is 1.
    """
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    dlogits += row * dlogits_stride
    slots = tl.arange(0, BLOCK_K)
    used = slots < k
    s_top = _logits(top + row * k, slots, k, scale, cap, SHAPE)
    q_top = tl.load(log_q + row * k + slots, mask=used, other=-float("inf")).to(tl.float32)
    rest_1, lse_rest = _rest_statistics(student, vocab, inverse_t, scale, cap, SHAPE, HAS_LABELS and not SAME, BLOCK)
    lse_k = _log_sum(s_top * (inverse_t * LOG2_E))
    tail = tl.load(log_tail + row).to(tl.float32)
    kd, top_kd_grad, rest_grad = _topk_events(
        s_top * inverse_t, q_top, used, lse_k, lse_rest, tail, beta, DIVERGENCE, MODE
    )
    tl.store(losses + rows + row, kd * kd_scale)
    label, ce_weight, ce_factor, lse_1 = -1, 0.0, 0.0, 0.0
    if HAS_LABELS:
        label, ce_weight, has_label = _read_label(labels, ce_weights, row)
        stored = used & (tl.load(indices + row * k + slots, mask=used, other=-1) == label)
        at_label = _shape(tl.load(student + tl.where(has_label, label, 0)), scale, cap, SHAPE)
        at_label = tl.maximum(at_label, tl.max(tl.where(stored, s_top, -float("inf")), 0))
        lse_1 = _logaddexp(_log_sum(s_top * LOG2_E), rest_1)
        logsumexp = tl.where(has_label, lse_1 * LN_2, 0.0)
        ce_factor = ce_weight * (1 + 2 * z_loss * logsumexp)
        tl.store(losses + row, tl.where(has_label, logsumexp - at_label, 0.0))
        tl.store(losses + 2 * rows + row, logsumexp)
        tl.debug_barrier()  # as in dense_rows_kernel
    if NEEDS_GRAD:
        kd_factor = tl.load(kd_weights + row) * kd_scale * inverse_t
        stored_grad = kd_factor * top_kd_grad
        if HAS_LABELS:
            stored_grad += ce_factor * tl.exp2(s_top * LOG2_E - lse_1) - tl.where(stored, ce_weight, 0.0)
        tl.store(top_grad + row * k + slots, _shape_backward(stored_grad, s_top, scale, cap, SHAPE), mask=used)
        shift = tl.where(lse_rest == -float("inf"), 0.0, lse_rest)
        rest_factor = kd_factor * rest_grad
        for start in range(0, vocab, BLOCK):
            cols = _columns(start, BLOCK)
            s = _logits(student, cols, vocab, scale, cap, SHAPE)
            grad = rest_factor * tl.exp2(s * (inverse_t * LOG2_E) - shift)  # p_v / p_tail of the rest's gradient
            if HAS_LABELS:
                grad += ce_factor * tl.exp2(s * LOG2_E - lse_1) - tl.where(cols == label, ce_weight, 0.0)
            grad = _shape_backward(grad, s, scale, cap, SHAPE)
            tl.store(dlogits + cols, grad.to(dlogits.dtype.element_ty), mask=cols < vocab)


def dense_rows(student, teacher, labels, ce_weights, kd_weights, options: RowOptions, dlogits=None) -> RowLosses:
    """``divergences.dense_rows`` on a GPU."""
    if student.dtype == torch.float64:
        return torch_twin.dense_rows(student, teacher, labels, ce_weights, kd_weights, options, dlogits)
    rows, vocab = student.shape
    losses = student.new_zeros(3, rows, dtype=torch.float32)
    shared = vocab if teacher is None else min(vocab, teacher.shape[1])
    out = student if dlogits is None else dlogits
    other = student if teacher is None else teacher
    dense_rows_kernel[(rows,)](
        student,
        student.stride(0),
        other,
        other.stride(0),
        out,
        out.stride(0),
        *_row_arguments(student, labels, ce_weights, kd_weights),
        losses,
        rows,
        vocab,
        shared,
        1 / options.temperature,
        options.beta,
        options.kd_scale,
        options.z_loss,
        *_shape_arguments(options.logit_scale, options.softcap),
        *_shape_arguments(options.teacher_logit_scale, options.teacher_softcap),
        DIVERGENCE=0 if teacher is None else _CODES[options.divergence],
        HAS_LABELS=labels is not None,
        SHAPE=_shape_code(options.logit_scale, options.softcap),
        T_SHAPE=_shape_code(options.teacher_logit_scale, options.teacher_softcap),
        SAME_WIDTH=shared == vocab,
        SAME=options.temperature == 1 and shared == vocab,
        NEEDS_GRAD=dlogits is not None,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        maxnreg=register_limit(options, student.dtype, other.dtype),
    )
    return RowLosses(*losses)


def register_limit(options: RowOptions, *dtypes: torch.dtype) -> int:
    """Softcaps, the logarithms of jsd and 16-bit logits (eight of which a thread must widen at once) need more
    registers."""
    capped = options.softcap is not None or options.teacher_softcap is not None
    return WIDE if capped or options.divergence == "jsd" or set(dtypes) != {torch.float32} else LEAN


def topk_rows(
    student, log_q, indices, log_tail, labels, ce_weights, kd_weights, options: RowOptions, dlogits=None
) -> RowLosses:
    """``divergences.topk_rows`` on a GPU; ``student`` is overwritten."""
    if options.topk_mode == "uniform_tail" and options.divergence != "mse":
        spread = divergences.spread_tail(log_q.float(), indices, log_tail.float(), student.shape[1])
        spread_options = options._replace(teacher_logit_scale=options.temperature, teacher_softcap=None)
        return dense_rows(student, spread, labels, ce_weights, kd_weights, spread_options, dlogits)
    if student.dtype != torch.float32 or indices.shape[1] > MAX_EVENTS:
        return torch_twin.topk_rows(student, log_q, indices, log_tail, labels, ce_weights, kd_weights, options, dlogits)
    rows, vocab = student.shape
    k = indices.shape[1]
    losses = student.new_zeros(3, rows)
    top = student.gather(1, indices)
    student.scatter_(1, indices, -math.inf)
    top_grad = torch.empty_like(top)
    out = student if dlogits is None else dlogits
    topk_rows_kernel[(rows,)](
        student,
        student.stride(0),
        out,
        out.stride(0),
        top,
        top_grad,
        log_q.contiguous(),
        indices.contiguous(),
        log_tail.contiguous(),
        *_row_arguments(student, labels, ce_weights, kd_weights),
        losses,
        rows,
        vocab,
        k,
        1 / options.temperature,
        options.beta,
        options.kd_scale,
        options.z_loss,
        *_shape_arguments(options.logit_scale, options.softcap),
        DIVERGENCE=_CODES[options.divergence],
        MODE=_MODES.get(options.topk_mode, 0),
        HAS_LABELS=labels is not None,
        SHAPE=_shape_code(options.logit_scale, options.softcap),
        SAME=options.temperature == 1,
        NEEDS_GRAD=dlogits is not None,
        BLOCK_K=triton.next_power_of_2(k),
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        maxnreg=LEAN,
    )
    if dlogits is not None:
        dlogits.scatter_(1, indices, top_grad.to(dlogits.dtype))
    return RowLosses(*losses)


def _row_arguments(student, labels, ce_weights, kd_weights):
    """Labels and weights as the kernels read them; an unused one is any valid pointer."""
    return [student if tensor is None else tensor.contiguous() for tensor in (labels, ce_weights, kd_weights)]


def _shape_code(logit_scale: float | None, softcap: float | None) -> int:
    if softcap is not None:
        return CAPPED.value
    return 0 if logit_scale is None else SCALED.value


def _shape_arguments(logit_scale: float | None, softcap: float | None) -> tuple[float, float]:
    return 1.0 if logit_scale is None else float(logit_scale), 1.0 if softcap is None else float(softcap)
