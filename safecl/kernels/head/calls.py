"""The fused distillation head: cross-entropy, KL, JSD and DER's MSE in one pass over lm_head, without [tokens, vocab].

    loss = sum_i ce_weights_i (ce_i + z_loss·logsumexp_i^2) + sum_i kd_weights_i kd_i

    logits = softcap·tanh(logit_scale (hidden @ weight.T + bias) / softcap)         fp32, never rounded
    ce_i   = -log softmax(logits_i)[label_i]                                       at temperature 1
    kd_i   = s_T·D(teacher_i, student_i), both at ``temperature`` T                 s_T = 1 ("none") or T^2 ("square")

The forward computes the gradients, chunk by chunk, and the backward only scales them: 8·tokens·H·V FLOP with an online
teacher and 6 without one, where designs that recompute need 12 to 16. This is possible because the per-token weights
are known before the forward and only the scalar ``loss`` has a gradient. The formulas of the divergences are in
``divergences.py``, those of the chunks in ``chunks.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safecl.kernels.head import checks
from safecl.kernels.head.backend import RowOptions
from safecl.kernels.head.chunks import run_head
from safecl.kernels.head.segments import HeadCall, SortedRows
from safecl.kernels.head.teachers import LogitsTeacher, Teacher, TopKTeacher


@dataclass(frozen=True)
class LinearDistillOutput:
    """The losses of one call.

    loss: 0-dim, the only field with a gradient. ce, kd, logsumexp: detached, shaped like the tokens, unweighted, fp32.
    Rows that were not computed hold 0: no label or ce weight 0 (ce, logsumexp), no teacher or kd weight 0 (kd).
    ``logsumexp`` (of the logits, at temperature 1) is the measure of stability that z_loss pulls towards 0.
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor
    logsumexp: Tensor


def linear_distill_loss(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    labels: Tensor | None = None,
    ce_weights: float | Tensor = 1.0,
    teacher: Teacher | None = None,
    teacher_rows: Tensor | None = None,
    kd_weights: float | Tensor = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    temperature_scale: str = "none",
    softcap: float | None = None,
    logit_scale: float | None = None,
    ignore_index: int = -100,
    tile_bytes: int = 2**30,
    z_loss: float = 0.0,
    sorted_rows: SortedRows | None = None,
) -> LinearDistillOutput:
    """Compute cross-entropy and distillation in one pass over the output head.

    hidden: [..., H] fp32, bf16 or fp16 (fp64 on the CPU), any number of tokens, also none. weight: [V, H], bias: [V],
        of the same dtype.
    labels: [...] integers below V. ``ignore_index`` excludes a token from the cross-entropy but not from the
        distillation; None: no cross-entropy.
    ce_weights, kd_weights: a number or [...] (one per token). They include the normaliser, may be negative, and have no
        gradient; a token of weight 0 is skipped.
    teacher: DenseTeacher, TopKTeacher, LogitsTeacher or None.
    teacher_rows: [rows] distinct integers, the (flattened) tokens of the teacher's rows in the teacher's order; None:
        all tokens.
    divergence: "forward_kl" KL(teacher || student), "reverse_kl", "jsd" (``beta`` is the teacher's share of the
        mixture, 0 < beta < 1), "mse" (of centred logits / temperature; DER).
    temperature_scale: "none", or "square" to multiply kd by temperature^2.
    tile_bytes: the memory budget for logits. The peak on top of inputs and returned gradients is tile_bytes + 4·V·H
        bytes (dW in fp32; none for a frozen head).
    sorted_rows: the result of `sort_rows` for the same arguments, its order on the device of ``hidden``. Without it a
        GPU has to be waited for once per call. The values are not checked again.

    A row whose label is ignored and that has no teacher is never read, so NaN there does not spread. Without any row
    the loss is an exact 0 whose gradients are exact zeros. Gradients are skipped for tensors that do not require them
    and under ``torch.no_grad``. The values of ``weight`` are used in the forward only. Differentiating the gradient
    (create_graph) raises RuntimeError.

    Raises ValueError, naming the argument, for shapes, dtypes or devices that do not fit, a label or index outside the
    vocabulary, repeated teacher_rows, or a teacher of another temperature or vocabulary.
    """
    shape = hidden.shape[:-1]
    hidden, labels, ce_weights, kd_weights = checks.flatten_tokens(hidden, labels, ce_weights, kd_weights)
    checks.check_head(hidden, weight, bias, softcap, logit_scale)
    checks.check_options(divergence, beta, temperature, temperature_scale)
    checks.check_teacher(teacher, teacher_rows, hidden, weight, temperature)
    checks.check_sorted(sorted_rows, hidden)
    if tile_bytes < 1:
        raise ValueError(f"tile_bytes must be at least 1, got {tile_bytes}")
    kind, tensors, teacher_dtype, teacher_softcap, teacher_scale, mode = _flat_teacher(teacher)
    grads = torch.is_grad_enabled()
    needs = [grads and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)]
    outputs = _linear_distill(
        hidden,
        weight,
        bias,
        labels,
        ce_weights,
        kd_weights,
        teacher_rows,
        tensors,
        kind,
        divergence,
        float(beta),
        float(temperature),
        checks.kd_scale(temperature, temperature_scale),
        float(z_loss),
        softcap,
        logit_scale,
        teacher_softcap,
        teacher_scale,
        mode,
        int(ignore_index),
        checks.compute_dtype(hidden, weight),
        teacher_dtype,
        int(tile_bytes),
        None if sorted_rows is None else sorted_rows["order"],
        [0] * 4 if sorted_rows is None else sorted_rows["counts"],
        *needs,
    )
    loss, ce, kd, logsumexp = outputs[:4]
    return LinearDistillOutput(loss, ce.detach().view(shape), kd.detach().view(shape), logsumexp.detach().view(shape))


def _flat_teacher(teacher: Teacher | None) -> tuple[str, list[Tensor], torch.dtype, float | None, float | None, str]:
    """Return a teacher in types that an operator's schema knows: kind, tensors, compute dtype, softcap, logit_scale,
    top-k mode."""
    if teacher is None:
        return "none", [], torch.float32, None, None, "tail"
    if isinstance(teacher, TopKTeacher):
        tensors = [teacher.log_probs.detach(), teacher.indices, teacher.log_tail.detach()]
        return "topk", tensors, torch.float32, None, None, teacher.mode
    if isinstance(teacher, LogitsTeacher):
        return "logits", [teacher.logits.detach()], torch.float32, None, None, "tail"
    tensors = [teacher.hidden.detach(), teacher.weight.detach()]
    if teacher.bias is not None:
        tensors.append(teacher.bias.detach())
    compute = checks.compute_dtype(teacher.weight, teacher.weight)
    return "dense", tensors, compute, teacher.softcap, teacher.logit_scale, "tail"


@torch.library.custom_op("safecl::linear_distill", mutates_args=())
def _linear_distill(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    ce_weights: Tensor,
    kd_weights: Tensor,
    teacher_rows: Tensor | None,
    teacher: list[Tensor],
    teacher_kind: str,
    divergence: str,
    beta: float,
    temperature: float,
    kd_scale: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float | None,
    teacher_softcap: float | None,
    teacher_logit_scale: float | None,
    topk_mode: str,
    ignore_index: int,
    compute_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    tile_bytes: int,
    order: Tensor | None,
    counts: list[int],
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (loss, ce, kd, logsumexp, scale, d_hidden, d_weight, d_bias).

    The gradients are those of loss / scale; d_weight and d_bias are fp32.
    """
    options = RowOptions(
        divergence,
        beta,
        temperature,
        kd_scale,
        z_loss,
        softcap,
        logit_scale,
        teacher_softcap,
        teacher_logit_scale,
        topk_mode,
    )
    scale = _gradient_scale(ce_weights, kd_weights, compute_dtype)
    call = HeadCall(
        hidden,
        weight,
        bias,
        labels,
        ce_weights / scale,
        kd_weights / scale,
        teacher_rows,
        teacher,
        teacher_kind,
        options,
        ignore_index,
        compute_dtype,
        teacher_dtype,
        tile_bytes,
        need_hidden,
        need_weight,
        need_bias,
        known=None if order is None else (order, counts),
    )
    with torch.autocast(hidden.device.type, enabled=False):
        result = run_head(call)
    with_z_loss = result.ce + z_loss * result.logsumexp.square()
    loss = weighted_sum(ce_weights, with_z_loss) + weighted_sum(kd_weights, result.kd)
    return loss, result.ce, result.kd, result.logsumexp, scale, *result.gradients()


def _gradient_scale(ce_weights: Tensor, kd_weights: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """Return 1, or for fp16 the largest weight.

    In fp16 probabilities / num_tokens would underflow before the backward multiplies by the loss scale.
    """
    if compute_dtype != torch.float16 or ce_weights.numel() == 0:
        return ce_weights.new_ones(())
    largest = torch.maximum(ce_weights.abs().max(), kd_weights.abs().max())
    return torch.where(largest > 0, largest, 1.0)


def weighted_sum(weights: Tensor, losses: Tensor) -> Tensor:
    """Return sum weights·losses, added in fp64; a weight of 0 also removes an infinite loss."""
    return torch.where(weights != 0, weights * losses, 0.0).sum(dtype=torch.float64).to(losses.dtype)


@_linear_distill.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor | None, ce_weights: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    need_hidden, need_weight, need_bias = rest[-3:]
    compute_dtype = rest[-8]
    tokens, wide = hidden.shape[0], torch.promote_types(compute_dtype, torch.float32)
    per_token = [hidden.new_empty(tokens, dtype=wide) for _ in range(3)]
    none = hidden.new_empty(0)
    return (
        per_token[0].new_empty(()),
        *per_token,
        ce_weights.new_empty(()),
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else none,
        weight.new_empty(weight.shape, dtype=wide) if need_weight else none.clone(),
        weight.new_empty(weight.shape[0], dtype=wide) if need_bias else none.clone(),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs, ctx.num_teacher = inputs[-3:], len(inputs[7])
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:3]]
    ctx.save_for_backward(*output[4:])
    ctx.set_materialize_grads(False)  # zeros of the size of every saved gradient otherwise


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("linear_distill_loss: the gradient cannot be differentiated again (create_graph=True)")
    scale, *saved = ctx.saved_tensors
    grads = [
        scaled(grad, grad_loss * scale, dtype) if need and grad_loss is not None else None
        for grad, need, dtype in zip(saved, ctx.needs, ctx.dtypes, strict=True)
    ]
    return (*grads, *[None] * 4, [None] * ctx.num_teacher, *[None] * 20)


def scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return grad·factor, rounded once, for a 0-dim fp32 factor.

    A product with a 0-dim tensor would first round the factor to the gradient's bf16.
    """
    return torch.mul(grad, factor.reshape([1] * grad.dim()), out=torch.empty_like(grad, dtype=dtype))


_linear_distill.register_autograd(_backward, setup_context=_setup_context)
