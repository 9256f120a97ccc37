"""The head's losses from logits that the model itself has computed, for heads that are more than one linear map.

The terms and weights are those of `linear_distill_loss`, and the forward forms the gradient here too, but the caller
materialises [tokens, vocab].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from safecl.kernels.head.backend import RowOptions
from safecl.kernels.head.calls import LinearDistillOutput, weighted_sum
from safecl.kernels.head.teachers import TopKTeacher
from safecl.kernels.head.torch_twin import dense_rows, topk_rows


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
    """Compute cross-entropy and distillation of given logits.

    logits: [tokens, V] floating point. labels: int64 [tokens], negative for none. ce_weights: fp32 [tokens], including
    the normaliser. teacher: top-k outputs of the tokens `teacher_rows` (int64 [rows]). kd_weights: fp32 [tokens]; both
    are needed with a teacher. Returns what linear_distill_loss returns; ce and kd are [tokens].
    """
    loss, ce, kd, logsumexp = _LogitsLoss.apply(  # type: ignore[no-untyped-call]  # torch gives it no types
        logits, labels, ce_weights, teacher, teacher_rows, kd_weights, divergence, temperature
    )
    return LinearDistillOutput(loss, ce, kd, logsumexp)


class _LogitsLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        ce_weights: Tensor,
        teacher: TopKTeacher | None,
        teacher_rows: Tensor | None,
        kd_weights: Tensor | None,
        divergence: str,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mode = teacher.mode if teacher is not None else "tail"
        options = RowOptions(divergence, 0.5, temperature, 1.0, 0.0, None, None, None, None, mode)
        student = logits.detach().float()
        dlogits = torch.zeros_like(student)
        plain = dense_rows(student.clone(), None, labels, ce_weights, None, options, dlogits)
        kd = student.new_zeros(len(student))
        loss = weighted_sum(ce_weights, plain.ce)
        if teacher is not None:
            assert teacher_rows is not None and kd_weights is not None
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
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (dlogits,) = ctx.saved_tensors
        return (dlogits * grad_loss).to(ctx.dtype), *[None] * 7
