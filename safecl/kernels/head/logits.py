"""The head's losses from logits that a model made itself, for heads that are more than one linear map.

Same terms and weights as `linear_distill_loss`, with [tokens, vocab] materialised by the caller; the gradient is formed
in the forward too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from safecl.kernels.head.calls import LinearDistillOutput, weighted_sum
from safecl.kernels.head.divergences import RowOptions, dense_rows, topk_rows
from safecl.kernels.head.teachers import TopKTeacher


def logits_distill_loss(
    logits: Tensor,
    *,
    labels: Tensor,
    ce_weights: Tensor,
    teacher: TopKTeacher | None = None,
    teacher_rows: Tensor | None = None,
    kd_weights: Tensor | None = None,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
) -> LinearDistillOutput:
    """Cross-entropy and distillation of given logits.

    logits: [tokens, V] floating point. labels: int64 [tokens], negative for none. ce_weights: fp32 [tokens], they carry
    the normaliser. teacher: top-k outputs about `teacher_rows` (int64 [rows]). kd_weights: fp32 [tokens].
    Returns what linear_distill_loss returns; ce and kd are [tokens].
    """
    loss, ce, kd, logsumexp = _LogitsLoss.apply(
        logits, labels, ce_weights, teacher, teacher_rows, kd_weights, divergence, temperature
    )
    return LinearDistillOutput(loss, ce, kd, logsumexp)


class _LogitsLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, ce_weights, teacher, teacher_rows, kd_weights, divergence, temperature):
        mode = teacher.mode if teacher is not None else "tail"
        options = RowOptions(divergence, 0.5, temperature, 1.0, 0.0, None, None, None, None, mode)
        student = logits.detach().float()
        dlogits = torch.zeros_like(student)
        plain = dense_rows(student.clone(), None, labels, ce_weights, None, options, dlogits)
        kd = student.new_zeros(len(student))
        loss = weighted_sum(ce_weights, plain.ce)
        if teacher is not None:
            chosen = student[teacher_rows]
            extra = torch.empty_like(chosen)
            weights = kd_weights[teacher_rows]
            kd[teacher_rows] = topk_rows(
                chosen, teacher.log_probs, teacher.indices, teacher.log_tail, None, None, weights, options, extra
            ).kd
            dlogits.index_add_(0, teacher_rows, extra)
            loss = loss + weighted_sum(kd_weights, kd)
        ctx.save_for_backward(dlogits)
        ctx.dtype = logits.dtype
        ctx.mark_non_differentiable(plain.ce, kd, plain.logsumexp)
        return loss, plain.ce, kd, plain.logsumexp

    @staticmethod
    def backward(ctx, grad_loss, *_):
        (dlogits,) = ctx.saved_tensors
        return (dlogits * grad_loss).to(ctx.dtype), *[None] * 7
