"""Distillation on logits that already exist: the row work of the fused head on its own.

per token D(teacher, student) with the formulas of ``divergences.py``, fp32 inside whatever the dtype of the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from safecl.kernels import backends
from safecl.kernels.head import checks as checks
from safecl.kernels.head.divergences import RowOptions
from safecl.kernels.spans import spans

REDUCTIONS = ("mean", "sum", "none")
_TILE_BYTES = 2**28


def distill_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    temperature_scale: str = "none",
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Divergence between teacher and student logits; the gradient goes to the student only.

    student_logits: [..., vocab], teacher_logits: [..., vocab] (its width may differ by padding), any floating dtype,
    one device. weights: [...] or None; tokens of weight 0 are never read. The other options: as in
    ``linear_distill_loss``. reduction: "none" gives [...] (weights·loss), "sum" their sum, "mean" their sum / sum of
    the weights (an exact 0 where that is 0). Returns fp32 (fp64 for fp64 logits). The gradient has the student's dtype,
    rounded after p - q is formed in fp32. Raises ValueError, naming the argument, for anything that does not fit.
    """
    _check(student_logits, teacher_logits, reduction)
    checks.check_options(divergence, beta, temperature, temperature_scale)
    checks.check_vocabulary("teacher_logits", teacher_logits.shape[-1], student_logits.shape[-1])
    tokens = student_logits.shape[:-1]
    weights = checks.token_weights("weights", 1.0 if weights is None else weights, student_logits)
    kd_scale = checks.kd_scale(temperature, temperature_scale)
    student, teacher = (logits.reshape(-1, logits.shape[-1]) for logits in (student_logits, teacher_logits.detach()))
    needs_grad = torch.is_grad_enabled() and student.requires_grad
    losses, _ = _distill_rows(
        student, teacher, weights, divergence, float(beta), float(temperature), kd_scale, needs_grad
    )
    losses = weights * losses
    if reduction == "none":
        return losses.view(tokens)
    if reduction == "sum":
        return losses.sum()
    total = weights.sum()
    return losses.sum() / torch.where(total == 0, 1.0, total)


def _check(student: Tensor, teacher: Tensor, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if student.dim() < 2 or student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student_logits {tuple(student.shape)} and teacher_logits {tuple(teacher.shape)} must be [..., vocab] over the same tokens"
        )
    if not (student.dtype.is_floating_point and teacher.dtype.is_floating_point):
        raise ValueError(f"logits must be floating point, got {student.dtype} and {teacher.dtype}")
    if student.device != teacher.device:
        raise ValueError(f"teacher_logits are on {teacher.device}, student_logits on {student.device}")


@torch.library.custom_op("safecl::distill_rows", mutates_args=())
def _distill_rows(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    divergence: str,
    beta: float,
    temperature: float,
    kd_scale: float,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """(loss [rows], gradient of each row's own loss [rows, vocab] in the student's dtype); rows of weight 0 give 0 and
    0."""
    losses = student.new_zeros(student.shape[0], dtype=torch.promote_types(student.dtype, torch.float32))
    grads = torch.zeros_like(student, memory_format=torch.contiguous_format) if needs_grad else student.new_empty(0)
    options = RowOptions(divergence, beta, temperature, kd_scale)
    rows = (weights != 0).nonzero()[:, 0]
    with torch.autocast(student.device.type, enabled=False):
        if rows.shape[0] == student.shape[0] and student.is_contiguous() and teacher.is_contiguous():
            losses.copy_(_row_losses(student, teacher, options, grads if needs_grad else None))
        else:
            for start, end in spans(rows.shape[0], max(1, _TILE_BYTES // (4 * student.shape[1]))):
                _distill_chunk(student, teacher, rows[start:end], options, losses, grads if needs_grad else None)
    return losses, grads


def _row_losses(student: Tensor, teacher: Tensor, options: RowOptions, dlogits: Tensor | None) -> Tensor:
    ones = student.new_ones(student.shape[0], dtype=torch.promote_types(student.dtype, torch.float32))
    kernels = backends.implementation("head", "distill_loss", student.device.type)
    return kernels.dense_rows(student, teacher, None, ones, ones, options, dlogits).kd


def _distill_chunk(student, teacher, rows, options, losses, grads) -> None:
    logits = student.index_select(0, rows)
    dlogits = None if grads is None else torch.empty_like(logits)
    losses[rows] = _row_losses(logits, teacher.index_select(0, rows), options, dlogits)
    if grads is not None:
        grads.index_copy_(0, rows, dlogits)


@_distill_rows.register_fake
def _(student, teacher, weights, divergence, beta, temperature, kd_scale, needs_grad):
    losses = student.new_empty(student.shape[0], dtype=torch.promote_types(student.dtype, torch.float32))
    return losses, torch.empty_like(
        student, memory_format=torch.contiguous_format
    ) if needs_grad else student.new_empty(0)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1])


def _backward(ctx, grad_losses, _):
    if torch.is_grad_enabled():
        raise RuntimeError("distill_loss: the gradient cannot be differentiated again (create_graph=True)")
    (grads,) = ctx.saved_tensors
    return torch.mul(grads, grad_losses[:, None], out=torch.empty_like(grads)), *[None] * 7


_distill_rows.register_autograd(_backward, setup_context=_setup_context)
