"""The Triton back end of the head: it launches the kernels of ``triton_kernels.py`` on tiles of rows.

Calls that the kernels do not cover (fp64 logits, a teacher of very many tokens) go to the torch twin.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from safecl.kernels.head import torch_twin
from safecl.kernels.head.backend import RowLosses, RowOptions
from safecl.kernels.head.divergences import spread_tail
from safecl.kernels.head.matmul import padded_width
from safecl.kernels.head.triton_kernels import RENORMALISED, TRUNCATED, dense_rows_kernel, topk_rows_kernel
from safecl.kernels.head.triton_math import CAPPED, FORWARD_KL, JSD, MSE, REVERSE_KL, SCALED

BLOCK, NUM_WARPS = 2048, 8
# Registers per thread that let three or two programs of eight warps share a multiprocessor. Without a limit the
# assembler spills.
LEAN, WIDE = 80, 128
MAX_EVENTS = 512  # more events than these would spill out of the registers
CODES = {"forward_kl": FORWARD_KL.value, "reverse_kl": REVERSE_KL.value, "jsd": JSD.value, "mse": MSE.value}
MODES = {"tail": 0, "truncated": TRUNCATED.value, "renormalised": RENORMALISED.value}


def dense_rows(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    ce_weights: Tensor | None,
    kd_weights: Tensor | None,
    options: RowOptions,
    dlogits: Tensor | None = None,
) -> RowLosses:
    """Compute ``HeadKernels.dense_rows`` on the student's GPU, whichever is the current one."""
    with torch.cuda.device_of(student):  # type: ignore[no-untyped-call]  # torch gives it no types
        return _dense_rows(student, teacher, labels, ce_weights, kd_weights, options, dlogits)


def _dense_rows(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    ce_weights: Tensor | None,
    kd_weights: Tensor | None,
    options: RowOptions,
    dlogits: Tensor | None,
) -> RowLosses:
    if student.dtype == torch.float64:
        return torch_twin.dense_rows(student, teacher, labels, ce_weights, kd_weights, options, dlogits)
    rows, vocab = len(student), _width(student, options)
    losses = student.new_zeros(3, rows, dtype=torch.float32)
    shared = vocab if teacher is None else min(vocab, _width(teacher, options))
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
        DIVERGENCE=0 if teacher is None else CODES[options.divergence],
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
    ce, kd, logsumexp = losses
    return RowLosses(ce, kd, logsumexp)


def register_limit(options: RowOptions, *dtypes: torch.dtype) -> int:
    """Return the registers per thread.

    Softcaps, the logarithms of jsd, and 16-bit logits (a thread widens eight at once) need more of them.
    """
    capped = options.softcap is not None or options.teacher_softcap is not None
    return WIDE if capped or options.divergence == "jsd" or set(dtypes) != {torch.float32} else LEAN


def topk_rows(
    student: Tensor,
    log_q: Tensor,
    indices: Tensor,
    log_tail: Tensor,
    labels: Tensor | None,
    ce_weights: Tensor | None,
    kd_weights: Tensor,
    options: RowOptions,
    dlogits: Tensor | None = None,
) -> RowLosses:
    """Compute ``HeadKernels.topk_rows`` on the student's GPU; ``student`` is overwritten."""
    with torch.cuda.device_of(student):  # type: ignore[no-untyped-call]  # torch gives it no types
        return _topk_rows(student, log_q, indices, log_tail, labels, ce_weights, kd_weights, options, dlogits)


def _topk_rows(
    student: Tensor,
    log_q: Tensor,
    indices: Tensor,
    log_tail: Tensor,
    labels: Tensor | None,
    ce_weights: Tensor | None,
    kd_weights: Tensor,
    options: RowOptions,
    dlogits: Tensor | None,
) -> RowLosses:
    if options.topk_mode == "uniform_tail" and options.divergence != "mse":
        spread = spread_tail(log_q.float(), indices, log_tail.float(), student.shape[1])
        spread_options = options._replace(teacher_logit_scale=options.temperature, teacher_softcap=None, padded=False)
        return dense_rows(student, spread, labels, ce_weights, kd_weights, spread_options, dlogits)
    if student.dtype != torch.float32 or indices.shape[1] > MAX_EVENTS:
        return torch_twin.topk_rows(student, log_q, indices, log_tail, labels, ce_weights, kd_weights, options, dlogits)
    rows, vocab = len(student), _width(student, options)
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
        DIVERGENCE=CODES[options.divergence],
        MODE=MODES.get(options.topk_mode, 0),
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
    ce, kd, logsumexp = losses
    return RowLosses(ce, kd, logsumexp)


def _width(logits: Tensor, options: RowOptions) -> int:
    """Return the columns that the kernels read. A multiple of 16 lets them load and store 16 bytes at once, which an
    odd vocabulary would not."""
    if not options.padded:
        return logits.shape[1]
    width = padded_width(logits.shape[1])
    assert logits.stride() == (width, 1), "the logits are not in a tile of new_tile"
    return width


def _row_arguments(
    student: Tensor, labels: Tensor | None, ce_weights: Tensor | None, kd_weights: Tensor | None
) -> list[Tensor]:
    """Return labels and weights as the kernels read them; an unused one is any valid pointer."""
    return [student if tensor is None else tensor.contiguous() for tensor in (labels, ce_weights, kd_weights)]


def _shape_code(logit_scale: float | None, softcap: float | None) -> int:
    if softcap is not None:
        return int(CAPPED.value)
    return 0 if logit_scale is None else int(SCALED.value)


def _shape_arguments(logit_scale: float | None, softcap: float | None) -> tuple[float, float]:
    return 1.0 if logit_scale is None else float(logit_scale), 1.0 if softcap is None else float(softcap)
