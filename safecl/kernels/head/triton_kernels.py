"""The row work of the distillation head as Triton kernels, with the formulas of ``divergences.py``.

One program processes one row in blocks, so the width of the vocabulary needs no registers. Passes over the fp32 tile,
in bytes per logit with a dense teacher and bf16 dlogits:

    1  running maximum and sum of the student (at 1 and at T) and of the teacher at T    8
    2  forward_kl, mse, cross-entropy: loss and gradient                                 8 + 2
    3  reverse_kl, jsd: pass 2 finds the loss and E = sum p g, pass 3 the gradient       8 + 8 + 2

Against a top-k teacher the k student logits are gathered and replaced by -inf before the kernel, so that pass 1 sums
the rest by itself (a tail formed as 1 - sum is noise) and pass 2 skips them. The k events are in registers, and their
gradients are scattered last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from safecl.kernels.head.triton_math import (
    FORWARD_KL,
    JSD,
    LN_2,
    LOG2_E,
    MSE,
    REVERSE_KL,
    VECTOR,
    add_to_sum,
    columns,
    dense_terms,
    empty_sum,
    event,
    finish_sum,
    is_finite,
    log_add,
    log_sum_of,
    shape_backward,
    shape_logits,
    truncated_event,
)

TRUNCATED, RENORMALISED = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _logits(pointer, cols, width, scale, cap, SHAPE: tl.constexpr):
    """Load a block of shaped logits, -inf beyond the width."""
    return shape_logits(tl.load(pointer + cols, mask=cols < width, other=-float("inf")), scale, cap, SHAPE)


@triton.jit
def _up_to(s, cols, shared, SAME_WIDTH: tl.constexpr):
    """Return the student's logits with -inf beyond the shared vocabulary."""
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
    """Pass 1: return log2-sum-exp of the student at 1 and T, of the teacher at T; for mse, sum and count of gaps."""
    peak_1, total_1 = empty_sum(BLOCK)
    peak_s, total_s = empty_sum(BLOCK)
    peak_t, total_t = empty_sum(BLOCK)
    gap_sum, gap_count = tl.zeros([BLOCK // VECTOR], tl.float32), tl.zeros([BLOCK // VECTOR], tl.float32)
    to_base_2 = inverse_t * LOG2_E
    for start in range(0, vocab, BLOCK):
        cols = columns(start, BLOCK)
        s = _logits(student, cols, vocab, scale, cap, SHAPE)
        if HAS_LABELS:
            peak_1, total_1 = add_to_sum(peak_1, total_1, s * LOG2_E)
        if DIVERGENCE != 0:
            y = _logits(teacher, cols, shared, t_scale, t_cap, T_SHAPE)
            z = _up_to(s, cols, shared, SAME_WIDTH)
            if DIVERGENCE == MSE:
                gap = (z - y) * inverse_t
                valid = is_finite(gap)
                gap_sum += tl.sum(tl.where(valid, gap, 0.0), 1)
                gap_count += tl.sum(valid.to(tl.float32), 1)
            else:
                peak_t, total_t = add_to_sum(peak_t, total_t, y * to_base_2)
                if not (SAME and HAS_LABELS):
                    peak_s, total_s = add_to_sum(peak_s, total_s, z * to_base_2)
    lse_1, lse_s = finish_sum(peak_1, total_1), finish_sum(peak_s, total_s)
    if SAME and HAS_LABELS:
        lse_s = lse_1
    return lse_1, lse_s, finish_sum(peak_t, total_t), tl.sum(gap_sum, 0), tl.sum(gap_count, 0)


@triton.jit
def _read_label(labels, ce_weights, row):
    """Return (label or -1, weight or 0, whether there is a label)."""
    label = tl.load(labels + row).to(tl.int32)
    weight = tl.load(ce_weights + row)
    has_label = (label >= 0) & (weight != 0)
    return tl.where(has_label, label, -1), tl.where(has_label, weight, 0.0), has_label


@triton.jit
def _store_cross_entropy(losses, row, rows, has_label, at_label, lse_1, ce_weight, z_loss):
    """Store cross-entropy and logsumexp of a row, and return the factor of its softmax in the gradient."""
    logsumexp = tl.where(has_label, lse_1 * LN_2, 0.0)
    ce_factor = ce_weight * (1 + 2 * z_loss * logsumexp)
    tl.store(losses + row, tl.where(has_label, logsumexp - at_label, 0.0))
    tl.store(losses + 2 * rows + row, logsumexp)
    # dlogits may be the tile itself: no warp may write before every warp has read the label's logit.
    tl.debug_barrier()
    return ce_factor


@triton.jit
def _divergence_pass(
    student,
    teacher,
    shared,
    lse_s,
    lse_t,
    inverse_t,
    beta,
    scale,
    cap,
    t_scale,
    t_cap,
    DIVERGENCE: tl.constexpr,
    SHAPE: tl.constexpr,
    T_SHAPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pass 2 of reverse_kl and jsd: return the loss of every lane, and E = sum p g."""
    kd_lanes, expected_lanes = tl.zeros([BLOCK // VECTOR], tl.float32), tl.zeros([BLOCK // VECTOR], tl.float32)
    for start in range(0, shared, BLOCK):
        cols = columns(start, BLOCK)
        z = _logits(student, cols, shared, scale, cap, SHAPE)
        y = _logits(teacher, cols, shared, t_scale, t_cap, T_SHAPE)
        term, _, p_grad = dense_terms(z, y, lse_s, lse_t, inverse_t, beta, DIVERGENCE)
        kd_lanes += tl.sum(term, 1)
        expected_lanes += tl.sum(p_grad, 1)
    return kd_lanes, tl.sum(expected_lanes, 0)


@triton.jit
def _gradient_pass(
    student,
    teacher,
    dlogits,
    vocab,
    shared,
    lse_1,
    lse_s,
    lse_t,
    mean_gap,
    expected,
    label,
    ce_weight,
    ce_factor,
    kd_factor,
    kd_lanes,
    inverse_t,
    beta,
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
    """The last pass: store the gradient; return the loss of every lane, which forward_kl and mse add here."""
    for start in range(0, vocab, BLOCK):
        cols = columns(start, BLOCK)
        s = _logits(student, cols, vocab, scale, cap, SHAPE)
        grad = tl.zeros_like(s)
        if DIVERGENCE != 0:
            y = _logits(teacher, cols, shared, t_scale, t_cap, T_SHAPE)
            z = _up_to(s, cols, shared, SAME_WIDTH)
            if DIVERGENCE == MSE:
                gap = (z - y) * inverse_t
                kd_grad = tl.where(is_finite(gap), gap - mean_gap, 0.0)
                kd_lanes += tl.sum(kd_grad * kd_grad, 1)
            else:
                term, p, kd_grad = dense_terms(z, y, lse_s, lse_t, inverse_t, beta, DIVERGENCE)
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
            grad = shape_backward(grad, s, scale, cap, SHAPE)
            tl.store(dlogits + cols, grad.to(dlogits.dtype.element_ty), mask=cols < vocab)
    return kd_lanes


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
    """Process one row; losses: [3, rows].

    DIVERGENCE 0: no teacher. SAME_WIDTH: shared == vocab. SAME: also T is 1, so that both losses share one softmax.
    """
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
        at_label = shape_logits(tl.load(student + tl.where(has_label, label, 0)), scale, cap, SHAPE)
        ce_factor = _store_cross_entropy(losses, row, rows, has_label, at_label, lse_1, ce_weight, z_loss)
    kd_factor, expected = 0.0, 0.0
    kd_lanes = tl.zeros([BLOCK // VECTOR], tl.float32)
    if DIVERGENCE != 0:
        kd_factor = tl.load(kd_weights + row) * kd_scale * inverse_t
    if DIVERGENCE == MSE:
        count = tl.maximum(count, 1.0)
        mean_gap = mean_gap / count
        kd_factor = kd_factor * 2 / count
    if DIVERGENCE == REVERSE_KL or DIVERGENCE == JSD:
        kd_lanes, expected = _divergence_pass(
            student, teacher, shared, lse_s, lse_t, inverse_t, beta, scale, cap, t_scale, t_cap,
            DIVERGENCE, SHAPE, T_SHAPE, BLOCK,
        )  # fmt: skip
    if NEEDS_GRAD or DIVERGENCE == FORWARD_KL or DIVERGENCE == MSE:
        kd_lanes = _gradient_pass(
            student, teacher, dlogits, vocab, shared, lse_1, lse_s, lse_t, mean_gap, expected,
            label, ce_weight, ce_factor, kd_factor, kd_lanes, inverse_t, beta, scale, cap, t_scale, t_cap,
            DIVERGENCE, HAS_LABELS, SHAPE, T_SHAPE, SAME_WIDTH, SAME, NEEDS_GRAD, BLOCK,
        )  # fmt: skip
    if DIVERGENCE != 0:
        kd = tl.maximum(tl.sum(kd_lanes, 0), 0.0)
        if DIVERGENCE == MSE:
            kd = kd / count
        tl.store(losses + rows + row, kd * kd_scale)


@triton.jit
def _topk_events(z_top, q_top, used, lse_k, lse_rest, log_tail, beta, DIVERGENCE: tl.constexpr, MODE: tl.constexpr):
    """Return (loss, gradient of the k stored tokens [BLOCK_K], gradient of all the others together).

    Logarithms are natural, except that lse_k and lse_rest are in base 2.
    """
    rest_grad = 0.0
    lse = log_add(lse_k, lse_rest) * LN_2
    rest = lse_rest * LN_2
    if DIVERGENCE == MSE:
        gap = z_top - q_top
        valid = used & is_finite(gap)
        count = tl.maximum(tl.sum(valid.to(tl.float32), 0), 1.0)
        grad = tl.where(valid, gap - tl.sum(tl.where(valid, gap, 0.0), 0) / count, 0.0)
        loss = tl.sum(grad * grad, 0) / count
        grad = grad * 2 / count
    elif MODE == RENORMALISED:
        lse_q = log_sum_of(q_top * LOG2_E)
        term, p, grad = dense_terms(z_top, q_top, lse_k, lse_q, 1.0, beta, DIVERGENCE)
        loss = tl.maximum(tl.sum(tl.where(used, term, 0.0), 0), 0.0)
        if DIVERGENCE != FORWARD_KL:
            grad -= p * tl.sum(tl.where(used, grad, 0.0), 0)
    elif MODE == TRUNCATED:
        term, p, grad = truncated_event(z_top - lse, q_top, beta, DIVERGENCE)
        loss = tl.sum(tl.where(used, term, 0.0), 0)
        expected = tl.sum(tl.where(used, grad, 0.0), 0)
        grad -= p * expected
        rest_grad = -tl.exp(rest - lse) * expected
    else:
        term, p, grad = event(z_top - lse, q_top, beta, DIVERGENCE)
        tail_term, p_tail, tail_grad = event(rest - lse, log_tail, beta, DIVERGENCE)
        loss = tl.maximum(tl.sum(tl.where(used, term, 0.0), 0) + tail_term, 0.0)
        expected = tl.sum(tl.where(used, grad, 0.0), 0) + tail_grad
        grad -= p * expected
        rest_grad = tail_grad - p_tail * expected
    return loss, grad, rest_grad


@triton.jit
def _rest_statistics(
    student, vocab, inverse_t, scale, cap, SHAPE: tl.constexpr, SEPARATE: tl.constexpr, BLOCK: tl.constexpr
):
    """Return log2-sum-exp of a row at 1 and at T; without SEPARATE the first is not needed or equals the second."""
    peak_1, total_1 = empty_sum(BLOCK)
    peak_t, total_t = empty_sum(BLOCK)
    for start in range(0, vocab, BLOCK):
        s = _logits(student, columns(start, BLOCK), vocab, scale, cap, SHAPE)
        peak_t, total_t = add_to_sum(peak_t, total_t, s * (inverse_t * LOG2_E))
        if SEPARATE:
            peak_1, total_1 = add_to_sum(peak_1, total_1, s * LOG2_E)
    at_t = finish_sum(peak_t, total_t)
    at_1 = at_t
    if SEPARATE:
        at_1 = finish_sum(peak_1, total_1)
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
    """Process one row against a top-k teacher; SAME: T is 1.

    The k stored tokens are -inf in ``student`` and raw in ``top`` [rows, k]; their gradients go to ``top_grad``.
    """
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    dlogits += row * dlogits_stride
    slots = tl.arange(0, BLOCK_K)
    used = slots < k
    s_top = _logits(top + row * k, slots, k, scale, cap, SHAPE)
    q_top = tl.load(log_q + row * k + slots, mask=used, other=-float("inf")).to(tl.float32)
    rest_1, lse_rest = _rest_statistics(student, vocab, inverse_t, scale, cap, SHAPE, HAS_LABELS and not SAME, BLOCK)
    lse_k = log_sum_of(s_top * (inverse_t * LOG2_E))
    tail = tl.load(log_tail + row).to(tl.float32)
    kd, top_kd_grad, rest_grad = _topk_events(
        s_top * inverse_t, q_top, used, lse_k, lse_rest, tail, beta, DIVERGENCE, MODE
    )
    tl.store(losses + rows + row, kd * kd_scale)
    label, ce_weight, ce_factor, lse_1 = -1, 0.0, 0.0, 0.0
    if HAS_LABELS:
        label, ce_weight, has_label = _read_label(labels, ce_weights, row)
        stored = used & (tl.load(indices + row * k + slots, mask=used, other=-1) == label)
        at_label = shape_logits(tl.load(student + tl.where(has_label, label, 0)), scale, cap, SHAPE)
        at_label = tl.maximum(at_label, tl.max(tl.where(stored, s_top, -float("inf")), 0))
        lse_1 = log_add(log_sum_of(s_top * LOG2_E), rest_1)
        ce_factor = _store_cross_entropy(losses, row, rows, has_label, at_label, lse_1, ce_weight, z_loss)
    if NEEDS_GRAD:
        kd_factor = tl.load(kd_weights + row) * kd_scale * inverse_t
        stored_grad = kd_factor * top_kd_grad
        if HAS_LABELS:
            stored_grad += ce_factor * tl.exp2(s_top * LOG2_E - lse_1) - tl.where(stored, ce_weight, 0.0)
        tl.store(top_grad + row * k + slots, shape_backward(stored_grad, s_top, scale, cap, SHAPE), mask=used)
        shift = tl.where(lse_rest == -float("inf"), 0.0, lse_rest)
        rest_factor = kd_factor * rest_grad
        for start in range(0, vocab, BLOCK):
            cols = columns(start, BLOCK)
            s = _logits(student, cols, vocab, scale, cap, SHAPE)
            grad = rest_factor * tl.exp2(s * (inverse_t * LOG2_E) - shift)  # p_v / p_tail of the rest's gradient
            if HAS_LABELS:
                grad += ce_factor * tl.exp2(s * LOG2_E - lse_1) - tl.where(cols == label, ce_weight, 0.0)
            grad = shape_backward(grad, s, scale, cap, SHAPE)
            tl.store(dlogits + cols, grad.to(dlogits.dtype.element_ty), mask=cols < vocab)
