"""The row work of the head in plain PyTorch: tiles of raw logits in, losses per row and dlogits out.

It defines what the Triton kernels compute, and is the back end where Triton does not run. The formulas are in
``divergences.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from safecl.kernels.head.backend import RowLosses, RowOptions
from safecl.kernels.head.divergences import (
    Scratch,
    Softmax,
    cross_entropy_terms,
    dense_divergence,
    shape_backward_,
    shape_logits_,
    softmax,
    topk_divergence,
)
from safecl.kernels.spans import spans

_BLOCK_ELEMENTS = 2**18

# (shaped logits, their softmax where it is known, the block's rows, scratch) -> (loss [rows], gradient of the logits)
Divergence = Callable[[Tensor, Softmax | None, slice, Scratch], tuple[Tensor, Tensor]]


def dense_rows(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    ce_weights: Tensor | None,
    kd_weights: Tensor | None,
    options: RowOptions,
    dlogits: Tensor | None = None,
) -> RowLosses:
    """Compute ``HeadKernels.dense_rows``; ``student`` is overwritten where it is fp32 and scaled or capped."""
    if teacher is None:
        return _row_blocks(student, labels, ce_weights, kd_weights, options, dlogits, None)
    raw_teacher = teacher
    shaped_in_place = options.teacher_logit_scale is not None or options.teacher_softcap is not None

    def divergence(logits: Tensor, known: Softmax | None, block: slice, scratch: Scratch) -> tuple[Tensor, Tensor]:
        raw = raw_teacher[block].to(logits.dtype, copy=shaped_in_place)
        shaped = shape_logits_(raw, options.teacher_logit_scale, options.teacher_softcap)
        return dense_divergence(logits, shaped, options, scratch, known)

    return _row_blocks(student, labels, ce_weights, kd_weights, options, dlogits, divergence)


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
    """Compute ``HeadKernels.topk_rows``."""

    def divergence(logits: Tensor, known: Softmax | None, block: slice, scratch: Scratch) -> tuple[Tensor, Tensor]:
        dtype = logits.dtype
        teacher = log_q[block].to(dtype), indices[block], log_tail[block].to(dtype)
        return topk_divergence(logits, *teacher, options, scratch)

    return _row_blocks(student, labels, ce_weights, kd_weights, options, dlogits, divergence)


def _row_blocks(
    student: Tensor,
    labels: Tensor | None,
    ce_weights: Tensor | None,
    kd_weights: Tensor | None,
    options: RowOptions,
    dlogits: Tensor | None,
    divergence: Divergence | None,
) -> RowLosses:
    """Process a few rows at a time, so that they and their temporaries fit the processor's cache."""
    rows, vocab = student.shape
    dtype = torch.promote_types(student.dtype, torch.float32)
    losses = student.new_zeros(3, rows, dtype=dtype)
    scratch = Scratch()
    for start, end in spans(rows, max(1, _BLOCK_ELEMENTS // vocab)):
        block = slice(start, end)
        logits = shape_logits_(student[block].to(dtype), options.logit_scale, options.softcap)
        grad = known = None
        if labels is not None:
            assert ce_weights is not None
            known = softmax(logits, scratch)
            grad = None if dlogits is None else scratch("grad", logits)
            ce = cross_entropy_terms(logits, known, labels[block], ce_weights[block], options.z_loss, grad)
            losses[0, block], losses[2, block], grad = ce
        if divergence is not None:
            losses[1, block], kd_grad = divergence(logits, known, block, scratch)
            if dlogits is not None:
                assert kd_weights is not None
                grad = _weighted_gradient(grad, kd_grad, kd_weights[block, None], vocab)
        if dlogits is not None:
            assert grad is not None, "a tile has labels or a teacher"
            dlogits[block] = shape_backward_(grad, logits, options.logit_scale, options.softcap)
    ce_losses, kd_losses, logsumexp = losses
    return RowLosses(ce_losses, kd_losses, logsumexp)


def _weighted_gradient(grad: Tensor | None, kd_grad: Tensor, weights: Tensor, vocab: int) -> Tensor:
    """Add the weighted gradient of the divergence to that of the cross-entropy, which is already weighted.

    A teacher of a narrower vocabulary knows the first tokens only. weights: [rows, 1].
    """
    if grad is None:
        return torch.nn.functional.pad(kd_grad.mul_(weights), (0, vocab - kd_grad.shape[-1]))
    grad[:, : kd_grad.shape[-1]].addcmul_(kd_grad, weights)
    return grad
