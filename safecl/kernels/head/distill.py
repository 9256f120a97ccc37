"""Distillation on logits that already exist: the row work of the fused head alone.

Per token D(teacher, student) with the formulas of ``divergences.py``, in fp32 for logits of any dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from safecl.kernels.head import checks
from safecl.kernels.head.backend import RowOptions, head_backend
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
    """Return the divergence between teacher and student logits; only the student gets a gradient.

    student_logits: [..., vocab], teacher_logits: [..., vocab] (its width may differ by padding), any floating dtype,
    one device. weights: [...] or None; tokens of weight 0 are never read. reduction: "none" gives weights·loss [...],
    "sum" their sum, "mean" their sum / sum of the weights (an exact 0 where that is 0). The other options are those of
    ``linear_distill_loss``. Returns fp32 (fp64 for fp64 logits). The gradient has the student's dtype, rounded after
    p - q is formed in fp32. Raises ValueError, naming the argument, for anything that does not fit.
    """
    _check(student_logits, teacher_logits, reduction)
    checks.check_options(divergence, beta, temperature, temperature_scale)
    checks.check_vocabulary("teacher_logits", teacher_logits.shape[-1], student_logits.shape[-1])
    tokens = student_logits.shape[:-1]
    weights = checks.token_weights("weights", 1.0 if weights is None else weights, student_logits)
    kd_scale = checks.kd_scale(temperature, temperature_scale)
    student, teacher = (logits.reshape(-1, logits.shape[-1]) for logits in (student_logits, teacher_logits.detach()))
    needs_grad = torch.is_grad_enabled() and student.requires_grad
    unweighted, _ = _distill_rows(
        student, teacher, weights, divergence, float(beta), float(temperature), kd_scale, needs_grad
    )
    losses: Tensor = weights * unweighted
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
            f"student_logits {tuple(student.shape)} and teacher_logits {tuple(teacher.shape)} "
            "must be [..., vocab] over the same tokens"
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
    """Return (loss [rows], gradient of each row's own loss [rows, vocab] in the student's dtype).

    Rows of weight 0 have a loss of 0 and a gradient of 0.
    """
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
    kernels = head_backend("distill_loss", student)
    return kernels.dense_rows(student, teacher, None, ones, ones, options, dlogits).kd


def _distill_chunk(
    student: Tensor, teacher: Tensor, rows: Tensor, options: RowOptions, losses: Tensor, grads: Tensor | None
) -> None:
    """Write the losses and the gradients of the selected rows."""
    logits = student.index_select(0, rows)
    dlogits = None if grads is None else torch.empty_like(logits)
    losses[rows] = _row_losses(logits, teacher.index_select(0, rows), options, dlogits)
    if grads is not None and dlogits is not None:
        grads.index_copy_(0, rows, dlogits)


@_distill_rows.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    divergence: str,
    beta: float,
    temperature: float,
    kd_scale: float,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    losses = student.new_empty(student.shape[0], dtype=torch.promote_types(student.dtype, torch.float32))
    if not needs_grad:
        return losses, student.new_empty(0)
    return losses, torch.empty_like(student, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)  # zeros of the size of every saved gradient otherwise


def _backward(ctx: Any, grad_losses: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("distill_loss: the gradient cannot be differentiated again (create_graph=True)")
    if grad_losses is None:
        return (None,) * 8
    (grads,) = ctx.saved_tensors
    return torch.mul(grads, grad_losses[:, None], out=torch.empty_like(grads)), *[None] * 7


_distill_rows.register_autograd(_backward, setup_context=_setup_context)
