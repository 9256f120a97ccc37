"""The row work of the distillation head in Triton: the functions of ``divergences.py``, same names, signatures and formulas.

One program walks one row in blocks, so the width of the vocabulary costs no registers. Passes over the fp32 tile, in bytes per logit with
a dense teacher and bf16 dlogits:

    1  online maximum and sum of the student (at 1 and at T) and of the teacher at T     8
    2  forward_kl, mse, cross-entropy: loss and gradient                                 8 + 2
    3  reverse_kl, jsd: pass 2 finds the loss and E = sum p g, pass 3 the gradient       8 + 8 + 2

Against a top-k teacher the k student logits are gathered and replaced by -inf first, so that pass 1 sums the rest by itself (a tail
formed as 1 - sum is noise) and pass 2 leaves them alone; the k events live in registers and their gradients are scattered last.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from . import divergences
from .divergences import RowLosses, RowOptions

BLOCK, NUM_WARPS = 4096, 8
JSD_BLOCK = 2048  # its third pass holds more per logit: 4096 spills on sm_100 where the width is no multiple of 16
MAX_EVENTS = 512  # beyond it the k events spill out of the registers
FORWARD_KL, REVERSE_KL, JSD, MSE = (tl.constexpr(code) for code in (1, 2, 3, 4))
TRUNCATED, RENORMALISED = tl.constexpr(1), tl.constexpr(2)
_CODES = {"forward_kl": 1, "reverse_kl": 2, "jsd": 3, "mse": 4}
_MODES = {"tail": 0, "truncated": 1, "renormalised": 2}


@triton.jit
def _expm1(x):
    series = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x / 5040))))))
    return tl.where(tl.abs(x) < 0.3, series, tl.exp(x) - 1)


@triton.jit
def _log1p(x):
    # log(1 + x) = 2 atanh(s); the hardware's logarithm has an absolute error of 2e-7 around 1
    s = x / (2 + x)
    s2 = s * s
    series = 2 * s * (1 + s2 * (1 / 3 + s2 * (1 / 5 + s2 * (1 / 7 + s2 / 9))))
    return tl.where(tl.abs(x) < 0.25, series, tl.log(1 + x))


@triton.jit
def _tanh(x):
    e = _expm1(-2 * tl.abs(x))
    return tl.where(x < 0, e, -e) / (2 + e)


@triton.jit
def _shape(raw, scale, cap, HAS_CAP: tl.constexpr):
    z = raw.to(tl.float32) * scale
    if HAS_CAP:
        z = tl.where(z == -float("inf"), z, cap * _tanh(z / cap))
    return z


@triton.jit
def _shape_slope(z, scale, cap, HAS_CAP: tl.constexpr):
    slope = scale
    if HAS_CAP:
        slope = scale * tl.where(z == -float("inf"), 0.0, 1 - (z / cap) * (z / cap))
    return slope


@triton.jit
def _online(peak, total, z):
    """Running maximum and sum of exp(z - maximum)."""
    new = tl.maximum(peak, tl.max(z, 0))
    safe = tl.where(new == -float("inf"), 0.0, new)
    return new, total * tl.exp(peak - safe) + tl.sum(tl.exp(z - safe), 0)


@triton.jit
def _finish(peak, total):
    return tl.where(peak == -float("inf"), -float("inf"), peak + tl.log(total))


@triton.jit
def _logaddexp(a, b):
    high, low = tl.maximum(a, b), tl.minimum(a, b)
    return tl.where(low == -float("inf"), high, high + _log1p(tl.exp(low - high)))


@triton.jit
def _finite(r):
    """The log-ratio inside gradients: 0 for 0 / 0, a large number for an infinite one."""
    r = tl.where(r != r, 0.0, r)
    r = tl.where(r == float("inf"), 100.0, r)
    return tl.where(r == -float("inf"), -100.0, r)


@triton.jit
def _kl_term(p, q, r):
    """q r - q + p >= 0, of KL(q || p)."""
    series = p * r * r * (1 / 2 + r * (1 / 3 + r * (1 / 8 + r * (1 / 30 + r / 144))))
    return tl.where(tl.abs(r) < 0.25, series, tl.where(q > 0, q * r, 0.0) - q + p)


@triton.jit
def _mixture(r, beta):
    """(log p / m, log q / m)."""
    above = r > 0
    near = _log1p(tl.where(above, 1 - beta, beta) * _expm1(-tl.abs(r)))
    return -tl.where(above, near + r, near), -tl.where(above, near, near - r)


@triton.jit
def _event(log_p, log_q, beta, DIVERGENCE: tl.constexpr):
    """(loss term, p, p·g) of one event; for forward_kl p·g is -q."""
    p, q, r = tl.exp(log_p), tl.exp(log_q), log_q - log_p
    if DIVERGENCE == FORWARD_KL:
        term, p_grad = _kl_term(p, q, r), -q
    elif DIVERGENCE == REVERSE_KL:
        term, p_grad = _kl_term(q, p, -r), -p * _finite(r)
    else:
        to_p, to_q = _mixture(r, beta)
        m = beta * q + (1 - beta) * p
        term = beta * _kl_term(m, q, to_q) + (1 - beta) * _kl_term(m, p, to_p)
        p_grad = (1 - beta) * p * _finite(to_p)
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
        to_p, to_q = _mixture(r, beta)
        term = beta * tl.where(q > 0, q * to_q, 0.0) + (1 - beta) * tl.where(p > 0, p * to_p, 0.0)
        p_grad = (1 - beta) * p * _finite(to_p)
    return term, p, p_grad


@triton.jit
def _dense_event(z, y, lse_s, lse_t, beta, DIVERGENCE: tl.constexpr):
    """``_event`` over a whole softmax, where sum q = 1: for forward_kl p·g is the gradient p - q, without cancellation near the teacher."""
    log_p, log_q = z - lse_s, y - lse_t
    term, p, p_grad = _event(log_p, log_q, beta, DIVERGENCE)
    if DIVERGENCE == FORWARD_KL:
        r = log_q - log_p
        p_grad = tl.where(tl.abs(r) < 0.3, -p * _expm1(r), p + p_grad)
    return term, p, p_grad


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _logits(pointer, cols, width, scale, cap, HAS_CAP: tl.constexpr):
    """A block of shaped logits; -inf beyond the width."""
    return _shape(tl.load(pointer + cols, mask=cols < width, other=-float("inf")), scale, cap, HAS_CAP)


@triton.jit
def _pair(student, teacher, cols, shared, inverse_t, scale, cap, t_scale, t_cap, HAS_CAP: tl.constexpr, HAS_T_CAP: tl.constexpr):
    """(student, teacher) logits at the temperature over the shared vocabulary."""
    z = _logits(student, cols, shared, scale, cap, HAS_CAP) * inverse_t
    return z, _logits(teacher, cols, shared, t_scale, t_cap, HAS_T_CAP) * inverse_t


@triton.jit
def _statistics(
    student, teacher, vocab, shared, inverse_t, scale, cap, t_scale, t_cap,
    DIVERGENCE: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_T_CAP: tl.constexpr, SAME: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass 1: logsumexp of the student at 1 and at T and of the teacher at T; sum and count of the logit gaps for mse."""
    peak_1, total_1 = -float("inf"), 0.0
    peak_s, total_s = -float("inf"), 0.0
    peak_t, total_t = -float("inf"), 0.0
    gap_sum, gap_count = 0.0, 0.0
    for start in range(0, vocab, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        s = _logits(student, cols, vocab, scale, cap, HAS_CAP)
        if HAS_LABELS:
            peak_1, total_1 = _online(peak_1, total_1, s)
        if DIVERGENCE != 0:
            y = _logits(teacher, cols, shared, t_scale, t_cap, HAS_T_CAP) * inverse_t
            z = tl.where(cols < shared, s * inverse_t, -float("inf"))
            if DIVERGENCE == MSE:
                valid = _is_finite(z - y)
                gap_sum += tl.sum(tl.where(valid, z - y, 0.0), 0)
                gap_count += tl.sum(valid.to(tl.float32), 0)
            else:
                peak_t, total_t = _online(peak_t, total_t, y)
                if not (SAME and HAS_LABELS):
                    peak_s, total_s = _online(peak_s, total_s, z)
    lse_1, lse_s = _finish(peak_1, total_1), _finish(peak_s, total_s)
    if SAME and HAS_LABELS:
        lse_s = lse_1
    return lse_1, lse_s, _finish(peak_t, total_t), gap_sum, gap_count


@triton.jit
def _read_label(labels, ce_weights, row):
    """(label or -1, weight or 0, whether there is one)."""
    label = tl.load(labels + row).to(tl.int32)
    weight = tl.load(ce_weights + row)
    has_label = (label >= 0) & (weight != 0)
    return tl.where(has_label, label, -1), tl.where(has_label, weight, 0.0), has_label


@triton.jit
def _ce_gradient(s, cols, label, factor, weight, lse_1):
    """factor·softmax - weight·onehot; 0 without a label."""
    return tl.where(label >= 0, factor * tl.exp(s - lse_1), 0.0) - tl.where(cols == label, weight, 0.0)


@triton.jit(do_not_specialize=["rows"])
def dense_rows_kernel(
    student, student_stride, teacher, teacher_stride, dlogits, dlogits_stride, labels, ce_weights, kd_weights, losses, rows,
    vocab, shared, inverse_t, beta, kd_scale, z_loss, scale, cap, t_scale, t_cap,
    DIVERGENCE: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_T_CAP: tl.constexpr, SAME: tl.constexpr,
    NEEDS_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row. losses: [3, rows]. DIVERGENCE 0: no teacher. SAME: T is 1, the vocabularies are equal, one logsumexp serves both losses."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    dlogits += row * dlogits_stride
    lse_1, lse_s, lse_t, mean_gap, count = _statistics(
        student, teacher, vocab, shared, inverse_t, scale, cap, t_scale, t_cap, DIVERGENCE, HAS_LABELS, HAS_CAP, HAS_T_CAP, SAME, BLOCK
    )
    label, ce_weight, ce_factor = -1, 0.0, 0.0
    if HAS_LABELS:
        label, ce_weight, has_label = _read_label(labels, ce_weights, row)
        at_label = _shape(tl.load(student + tl.where(has_label, label, 0)), scale, cap, HAS_CAP)
        lse_1 = tl.where(has_label, lse_1, 0.0)
        ce_factor = ce_weight * (1 + 2 * z_loss * lse_1)
        tl.store(losses + row, tl.where(has_label, lse_1 - at_label, 0.0))
        tl.store(losses + 2 * rows + row, lse_1)
        tl.debug_barrier()  # dlogits may be the tile itself: no warp may write before every warp has read the label's logit
    kd, expected, kd_factor = 0.0, 0.0, 0.0
    if DIVERGENCE != 0:
        kd_factor = tl.load(kd_weights + row) * kd_scale * inverse_t
    if DIVERGENCE == MSE:
        count = tl.maximum(count, 1.0)
        mean_gap = mean_gap / count
        kd_factor = kd_factor * 2 / count
    if DIVERGENCE == REVERSE_KL or DIVERGENCE == JSD:
        for start in range(0, shared, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            z, y = _pair(student, teacher, cols, shared, inverse_t, scale, cap, t_scale, t_cap, HAS_CAP, HAS_T_CAP)
            term, p, p_grad = _dense_event(z, y, lse_s, lse_t, beta, DIVERGENCE)
            kd += tl.sum(term, 0)
            expected += tl.sum(p_grad, 0)
    if NEEDS_GRAD or DIVERGENCE == FORWARD_KL or DIVERGENCE == MSE:
        for start in range(0, vocab, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            s = _logits(student, cols, vocab, scale, cap, HAS_CAP)
            grad = tl.zeros_like(s)
            if HAS_LABELS:
                grad = _ce_gradient(s, cols, label, ce_factor, ce_weight, lse_1)
            if DIVERGENCE != 0:
                y = _logits(teacher, cols, shared, t_scale, t_cap, HAS_T_CAP) * inverse_t
                z = tl.where(cols < shared, s * inverse_t, -float("inf"))
                if DIVERGENCE == MSE:
                    kd_grad = tl.where(_is_finite(z - y), z - y - mean_gap, 0.0)
                    kd += tl.sum(kd_grad * kd_grad, 0)
                else:
                    term, p, kd_grad = _dense_event(z, y, lse_s, lse_t, beta, DIVERGENCE)
                    if DIVERGENCE == FORWARD_KL:
                        kd += tl.sum(term, 0)
                    else:
                        kd_grad -= p * expected
                grad += kd_factor * kd_grad
            if NEEDS_GRAD:
                grad = grad * _shape_slope(s, scale, cap, HAS_CAP)
                tl.store(dlogits + cols, grad.to(dlogits.dtype.element_ty), mask=cols < vocab)
    if DIVERGENCE == MSE:
        kd = kd / count
    if DIVERGENCE != 0:
        tl.store(losses + rows + row, kd * kd_scale)


@triton.jit
def _topk_events(z_top, q_top, used, lse_k, lse_rest, log_tail, beta, DIVERGENCE: tl.constexpr, MODE: tl.constexpr):
    """(loss, gradient of the k stored tokens [BLOCK_K], gradient of all the others together)."""
    rest_grad = 0.0
    lse = _logaddexp(lse_k, lse_rest)
    if DIVERGENCE == MSE:
        gap = z_top - q_top
        valid = used & _is_finite(gap)
        count = tl.maximum(tl.sum(valid.to(tl.float32), 0), 1.0)
        grad = tl.where(valid, gap - tl.sum(tl.where(valid, gap, 0.0), 0) / count, 0.0)
        loss = tl.sum(grad * grad, 0) / count
        grad = grad * 2 / count
    elif MODE == RENORMALISED:
        peak, total = _online(-float("inf"), 0.0, q_top)
        term, p, grad = _dense_event(z_top, q_top, lse_k, _finish(peak, total), beta, DIVERGENCE)
        loss = tl.sum(tl.where(used, term, 0.0), 0)
        if DIVERGENCE != FORWARD_KL:
            grad -= p * tl.sum(tl.where(used, grad, 0.0), 0)
    elif MODE == TRUNCATED:
        term, p, grad = _truncated_event(z_top - lse, q_top, beta, DIVERGENCE)
        loss = tl.sum(tl.where(used, term, 0.0), 0)
        expected = tl.sum(tl.where(used, grad, 0.0), 0)
        grad -= p * expected
        rest_grad = -tl.exp(lse_rest - lse) * expected
    else:
        term, p, grad = _event(z_top - lse, q_top, beta, DIVERGENCE)
        tail_term, p_tail, tail_grad = _event(lse_rest - lse, log_tail, beta, DIVERGENCE)
        loss = tl.sum(tl.where(used, term, 0.0), 0) + tail_term
        expected = tl.sum(tl.where(used, grad, 0.0), 0) + tail_grad
        grad -= p * expected
        rest_grad = tail_grad - p_tail * expected
    return loss, grad, rest_grad


@triton.jit(do_not_specialize=["rows"])
def topk_rows_kernel(
    student, student_stride, dlogits, dlogits_stride, top, top_grad, log_q, indices, log_tail, labels, ce_weights, kd_weights, losses, rows,
    vocab, k, inverse_t, beta, kd_scale, z_loss, scale, cap,
    DIVERGENCE: tl.constexpr, MODE: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_CAP: tl.constexpr, NEEDS_GRAD: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row whose k stored tokens are -inf in ``student`` and raw in ``top`` [rows, k]; their gradients go to ``top_grad`` [rows, k]."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    dlogits += row * dlogits_stride
    slots = tl.arange(0, BLOCK_K)
    used = slots < k
    s_top = _logits(top + row * k, slots, k, scale, cap, HAS_CAP)
    z_top = s_top * inverse_t
    q_top = tl.load(log_q + row * k + slots, mask=used, other=-float("inf")).to(tl.float32)
    peak_1, total_1 = _online(-float("inf"), 0.0, s_top)
    peak_k, total_k = _online(-float("inf"), 0.0, z_top)
    peak_r, total_r = -float("inf"), 0.0
    for start in range(0, vocab, BLOCK):
        s = _logits(student, start + tl.arange(0, BLOCK), vocab, scale, cap, HAS_CAP)
        if HAS_LABELS:
            peak_1, total_1 = _online(peak_1, total_1, s)
        peak_r, total_r = _online(peak_r, total_r, s * inverse_t)
    lse_rest = _finish(peak_r, total_r)
    tail = tl.load(log_tail + row).to(tl.float32)
    kd, top_kd_grad, rest_grad = _topk_events(z_top, q_top, used, _finish(peak_k, total_k), lse_rest, tail, beta, DIVERGENCE, MODE)
    tl.store(losses + rows + row, kd * kd_scale)
    label, ce_weight, ce_factor, lse_1 = -1, 0.0, 0.0, 0.0
    if HAS_LABELS:
        label, ce_weight, has_label = _read_label(labels, ce_weights, row)
        stored = used & (tl.load(indices + row * k + slots, mask=used, other=-1) == label)
        at_label = _shape(tl.load(student + tl.where(has_label, label, 0)), scale, cap, HAS_CAP)
        at_label = tl.maximum(at_label, tl.max(tl.where(stored, s_top, -float("inf")), 0))
        lse_1 = tl.where(has_label, _finish(peak_1, total_1), 0.0)
        ce_factor = ce_weight * (1 + 2 * z_loss * lse_1)
        tl.store(losses + row, tl.where(has_label, lse_1 - at_label, 0.0))
        tl.store(losses + 2 * rows + row, lse_1)
        tl.debug_barrier()  # as in dense_rows_kernel
    if NEEDS_GRAD:
        kd_factor = tl.load(kd_weights + row) * kd_scale * inverse_t
        stored_grad = kd_factor * top_kd_grad
        if HAS_LABELS:
            stored_grad += _ce_gradient(s_top, tl.where(stored, label, -2), label, ce_factor, ce_weight, lse_1)
        tl.store(top_grad + row * k + slots, stored_grad * _shape_slope(s_top, scale, cap, HAS_CAP), mask=used)
        shift = tl.where(lse_rest == -float("inf"), 0.0, lse_rest)
        for start in range(0, vocab, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            s = _logits(student, cols, vocab, scale, cap, HAS_CAP)
            grad = kd_factor * rest_grad * tl.exp(s * inverse_t - shift)  # p_v / p_tail of the rest's gradient
            if HAS_LABELS:
                grad += _ce_gradient(s, cols, label, ce_factor, ce_weight, lse_1)
            grad = grad * _shape_slope(s, scale, cap, HAS_CAP)
            tl.store(dlogits + cols, grad.to(dlogits.dtype.element_ty), mask=cols < vocab)


def dense_rows(student, teacher, labels, ce_weights, kd_weights, options: RowOptions, dlogits=None) -> RowLosses:
    """``divergences.dense_rows`` on a GPU."""
    if student.dtype == torch.float64:
        return divergences.dense_rows(student, teacher, labels, ce_weights, kd_weights, options, dlogits)
    rows, vocab = student.shape
    losses = student.new_zeros(3, rows, dtype=torch.float32)
    shared = vocab if teacher is None else min(vocab, teacher.shape[1])
    out = student if dlogits is None else dlogits
    other = student if teacher is None else teacher
    dense_rows_kernel[(rows,)](
        student, student.stride(0), other, other.stride(0), out, out.stride(0), *_row_arguments(student, labels, ce_weights, kd_weights),
        losses, rows, vocab, shared, 1 / options.temperature, options.beta, options.kd_scale, options.z_loss,
        *_shape_arguments(options.logit_scale, options.softcap), *_shape_arguments(options.teacher_logit_scale, options.teacher_softcap),
        DIVERGENCE=0 if teacher is None else _CODES[options.divergence], HAS_LABELS=labels is not None,
        HAS_CAP=options.softcap is not None, HAS_T_CAP=options.teacher_softcap is not None,
        SAME=options.temperature == 1 and shared == vocab, NEEDS_GRAD=dlogits is not None,
        BLOCK=min(BLOCK, JSD_BLOCK) if options.divergence == "jsd" else BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return RowLosses(*losses)


def topk_rows(student, log_q, indices, log_tail, labels, ce_weights, kd_weights, options: RowOptions, dlogits=None) -> RowLosses:
    """``divergences.topk_rows`` on a GPU; ``student`` is overwritten."""
    if options.topk_mode == "uniform_tail" and options.divergence != "mse":
        spread = divergences.spread_tail(log_q.float(), indices, log_tail.float(), student.shape[1])
        spread_options = options._replace(teacher_logit_scale=options.temperature, teacher_softcap=None)
        return dense_rows(student, spread, labels, ce_weights, kd_weights, spread_options, dlogits)
    if student.dtype != torch.float32 or indices.shape[1] > MAX_EVENTS:
        return divergences.topk_rows(student, log_q, indices, log_tail, labels, ce_weights, kd_weights, options, dlogits)
    rows, vocab = student.shape
    k = indices.shape[1]
    losses = student.new_zeros(3, rows)
    top = student.gather(1, indices)
    student.scatter_(1, indices, -math.inf)
    top_grad = torch.empty_like(top)
    out = student if dlogits is None else dlogits
    topk_rows_kernel[(rows,)](
        student, student.stride(0), out, out.stride(0), top, top_grad, log_q.contiguous(), indices.contiguous(), log_tail.contiguous(),
        *_row_arguments(student, labels, ce_weights, kd_weights), losses, rows,
        vocab, k, 1 / options.temperature, options.beta, options.kd_scale, options.z_loss,
        *_shape_arguments(options.logit_scale, options.softcap),
        DIVERGENCE=_CODES[options.divergence], MODE=_MODES.get(options.topk_mode, 0), HAS_LABELS=labels is not None,
        HAS_CAP=options.softcap is not None, NEEDS_GRAD=dlogits is not None, BLOCK_K=triton.next_power_of_2(k), BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    if dlogits is not None:
        dlogits.scatter_(1, indices, top_grad.to(dlogits.dtype))
    return RowLosses(*losses)


def _row_arguments(student, labels, ce_weights, kd_weights):
    """Labels and weights as the kernels read them; an unused one is any valid pointer."""
    return [student if tensor is None else tensor.contiguous() for tensor in (labels, ce_weights, kd_weights)]


def _shape_arguments(logit_scale: float | None, softcap: float | None) -> tuple[float, float]:
    return 1.0 if logit_scale is None else float(logit_scale), 1.0 if softcap is None else float(softcap)
