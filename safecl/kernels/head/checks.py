"""Checks of the head's arguments. Each raises a ValueError that names the argument, its value and what would fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from safecl.kernels.head.divergences import DIVERGENCES
from safecl.kernels.head.teachers import TOPK_MODES, DenseTeacher, LogitsTeacher, Teacher, TopKTeacher

TEMPERATURE_SCALES = ("none", "square")
# Heads of one tokenizer that differ in padding alone differ by fewer tokens than this, and by less than 1/16.
_PADDING_TOKENS = 1024


def flatten_tokens(
    hidden: Tensor, labels: Tensor | None, ce_weights: float | Tensor, kd_weights: float | Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return hidden [tokens, H], labels [tokens] or None, and both weights [tokens] fp32 (fp64 for fp64 hidden)."""
    if hidden.dim() < 2:
        raise ValueError(
            f"hidden must be [tokens, hidden] (leading dimensions are flattened), got shape {tuple(hidden.shape)}"
        )
    tokens = hidden.shape[:-1]
    if labels is not None:
        if labels.shape != tokens:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}, hidden has tokens {tuple(tokens)}; they must agree"
            )
        if labels.dtype.is_floating_point or labels.dtype == torch.bool:
            raise ValueError(f"labels must be integers, got {labels.dtype}")
        _same_device("labels", labels, hidden)
        labels = labels.reshape(-1).long()
    ce_weights = token_weights("ce_weights", ce_weights, hidden)
    kd_weights = token_weights("kd_weights", kd_weights, hidden)
    return hidden.reshape(-1, hidden.shape[-1]), labels, ce_weights, kd_weights


def token_weights(name: str, value: float | Tensor, hidden: Tensor) -> Tensor:
    """Return a number or one weight per token as [tokens], fp32."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    tokens = hidden.shape[:-1]
    if not isinstance(value, Tensor):
        return torch.full((tokens.numel(),), float(value), dtype=dtype, device=hidden.device)
    if value.requires_grad:
        raise ValueError(f"{name} requires grad, but the head gives weights no gradient: pass {name}.detach()")
    if value.dim() and value.shape != tokens:
        raise ValueError(
            f"{name} must be a number or have one entry per token {tuple(tokens)}, got shape {tuple(value.shape)}"
        )
    if value.dim():
        _same_device(name, value, hidden)
    return value.to(device=hidden.device, dtype=dtype).expand(tokens).reshape(-1).clone()


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float | None,
    name: str = "",
) -> None:
    """Check hidden states and their head.

    name: "teacher " for a teacher's, whose hidden states may be on the host.
    """
    if not hidden.dtype.is_floating_point:
        raise ValueError(f"{name}hidden must be floating point, got {hidden.dtype}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"{name}weight must be [vocab, {hidden.shape[-1]}] to fit {name}hidden, got shape {tuple(weight.shape)}"
        )
    if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise ValueError(
            f"{name}weight is {weight.dtype} and {name}hidden is {hidden.dtype}; cast one of them, or use autocast"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}bias must be [{weight.shape[0]}] to fit {name}weight, got shape {tuple(bias.shape)}")
    if not name:
        _same_device("weight", weight, hidden)
    if bias is not None:
        _same_device(f"{name}bias", bias, weight)
    for label, value in (("softcap", softcap), ("logit_scale", logit_scale)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}{label} must be a positive number or None, got {value}")


def check_options(divergence: str, beta: float, temperature: float, temperature_scale: str) -> None:
    """Check the choice of the divergence and its settings."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    if divergence == "jsd" and not 0 < beta < 1:
        raise ValueError(
            f"beta must lie strictly between 0 and 1 for jsd, got {beta}; use forward_kl or reverse_kl for the limits"
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a positive number, got {temperature}")
    if temperature_scale not in TEMPERATURE_SCALES:
        raise ValueError(f"temperature_scale must be one of {', '.join(TEMPERATURE_SCALES)}, got {temperature_scale!r}")


def kd_scale(temperature: float, temperature_scale: str) -> float:
    """Return the factor of the distillation loss: 1 or T^2."""
    return float(temperature) ** 2 if temperature_scale == "square" else 1.0


def check_teacher(
    teacher: Teacher | None, teacher_rows: Tensor | None, hidden: Tensor, weight: Tensor, temperature: float
) -> None:
    """Check that the teacher's tensors fit each other and the student's; hidden: [tokens, H]."""
    if teacher is None:
        if teacher_rows is not None:
            raise ValueError("teacher_rows is given without a teacher")
        return
    if isinstance(teacher, DenseTeacher):
        _check_dense(teacher, weight)
    elif isinstance(teacher, LogitsTeacher):
        _check_logits(teacher, weight)
    elif isinstance(teacher, TopKTeacher):
        _check_topk(teacher, weight, temperature)
    else:
        raise ValueError(
            f"teacher must be a DenseTeacher, TopKTeacher, LogitsTeacher or None, got {type(teacher).__name__}"
        )
    _check_rows(teacher, teacher_rows, hidden)


def _check_rows(teacher: Teacher, teacher_rows: Tensor | None, hidden: Tensor) -> None:
    if teacher_rows is None:
        if teacher.num_rows != hidden.shape[0]:
            raise ValueError(
                f"the teacher has {teacher.num_rows} rows for {hidden.shape[0]} tokens; name the tokens in teacher_rows"
            )
        return
    if teacher_rows.dim() != 1 or teacher_rows.dtype.is_floating_point or teacher_rows.dtype == torch.bool:
        raise ValueError(
            f"teacher_rows must be [rows] integers, got {teacher_rows.dtype} of shape {tuple(teacher_rows.shape)}"
        )
    if teacher_rows.shape[0] != teacher.num_rows:
        raise ValueError(f"teacher_rows names {teacher_rows.shape[0]} tokens, the teacher has {teacher.num_rows} rows")
    _same_device("teacher_rows", teacher_rows, hidden)


def _check_dense(teacher: DenseTeacher, weight: Tensor) -> None:
    if teacher.hidden.dim() != 2:
        raise ValueError(f"teacher hidden must be [rows, hidden], got shape {tuple(teacher.hidden.shape)}")
    check_head(teacher.hidden, teacher.weight, teacher.bias, teacher.softcap, teacher.logit_scale, "teacher ")
    _same_device("teacher weight", teacher.weight, weight)
    check_vocabulary("teacher weight", teacher.weight.shape[0], weight.shape[0])


def _check_logits(teacher: LogitsTeacher, weight: Tensor) -> None:
    if teacher.logits.dim() != 2 or not teacher.logits.dtype.is_floating_point:
        raise ValueError(
            "teacher logits must be [rows, vocab] floating point, "
            f"got {teacher.logits.dtype} {tuple(teacher.logits.shape)}"
        )
    check_vocabulary("teacher logits", teacher.logits.shape[1], weight.shape[0])


def _check_topk(teacher: TopKTeacher, weight: Tensor, temperature: float) -> None:
    log_probs, indices, log_tail = teacher.log_probs, teacher.indices, teacher.log_tail
    if indices.dim() != 2 or log_probs.shape != indices.shape or log_tail.shape != indices.shape[:1]:
        shapes = f"{tuple(log_probs.shape)}, {tuple(indices.shape)}, {tuple(log_tail.shape)}"
        raise ValueError(f"teacher log_probs, indices, log_tail must be [rows, k], [rows, k], [rows]; got {shapes}")
    if not (log_probs.dtype.is_floating_point and log_tail.dtype.is_floating_point) or indices.dtype.is_floating_point:
        dtypes = f"{log_probs.dtype}, {log_tail.dtype}, {indices.dtype}"
        raise ValueError(f"teacher log_probs and log_tail must be floating point and indices integers; got {dtypes}")
    if teacher.mode not in TOPK_MODES:
        raise ValueError(f"teacher mode must be one of {', '.join(TOPK_MODES)}, got {teacher.mode!r}")
    if teacher.vocab_size != weight.shape[0]:
        raise ValueError(
            f"the teacher was made for a vocabulary of {teacher.vocab_size} tokens, "
            f"the student's head has {weight.shape[0]}"
        )
    if not 1 <= indices.shape[1] <= teacher.vocab_size:
        raise ValueError(f"the teacher stores k = {indices.shape[1]} tokens of a vocabulary of {teacher.vocab_size}")
    if not math.isclose(teacher.temperature, temperature, rel_tol=1e-6):
        raise ValueError(
            f"the teacher was made at temperature {teacher.temperature}, the loss asks for {temperature}; "
            "a stored tail cannot be converted: make the teacher again, or train at its temperature"
        )


def check_sorted(sorted_rows: Mapping[str, Any] | None, hidden: Tensor) -> None:
    """Check that the sorted rows are those of a call with this many tokens; hidden: [tokens, H]."""
    if sorted_rows is None:
        return
    order, counts = sorted_rows["order"], sorted_rows["counts"]
    if order.shape != hidden.shape[:1] or order.dtype != torch.int64 or len(counts) != 4 or sum(counts) != len(order):
        raise ValueError(f"sorted_rows must be those of {hidden.shape[0]} tokens, got {tuple(order.shape)}, {counts}")
    _same_device("sorted_rows", order, hidden)


def check_vocabulary(name: str, teacher_vocab: int, student_vocab: int) -> None:
    """Raise ValueError where the widths of two heads differ by more than padding: another vocabulary."""
    low, high = sorted((teacher_vocab, student_vocab))
    if high - low >= _PADDING_TOKENS or (high - low) * 16 > low:
        raise ValueError(
            f"{name} has a vocabulary of {teacher_vocab} tokens, the student {student_vocab}: more than padding; "
            "if the first tokens are the same in both, slice the wider head to them"
        )


def _same_device(name: str, tensor: Tensor, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, the head's other tensors on {other.device}")


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype that GEMM operands are rounded to: their own, or autocast's where it is on."""
    device = hidden.device.type
    return (
        torch.get_autocast_dtype(device)
        if torch.is_autocast_enabled(device)
        else torch.promote_types(hidden.dtype, weight.dtype)
    )


def value_questions(
    labels: Tensor | None,
    ignore_index: int,
    vocab: int,
    teacher_rows: Tensor | None,
    tokens: int,
    teacher: list[Tensor],
    kind: str,
) -> dict[str, Tensor]:
    """Return the checks of index ranges and repetitions: message -> 0-dim bool on the device, true where it applies."""
    questions = {}
    if labels is not None and labels.numel():
        outside = ((labels < 0) | (labels >= vocab)) & (labels != ignore_index)
        questions[f"labels must lie in 0..{vocab - 1} or be ignore_index {ignore_index}"] = outside.any()
    if teacher_rows is not None and teacher_rows.numel():
        ordered = teacher_rows.sort().values
        questions[f"teacher_rows must lie in 0..{tokens - 1}"] = (ordered[0] < 0) | (ordered[-1] >= tokens)
        questions["teacher_rows names a token twice"] = (ordered[1:] == ordered[:-1]).any()
    if kind == "topk" and teacher[1].numel():
        ordered = teacher[1].long().sort(-1).values
        questions[f"teacher indices must lie in 0..{vocab - 1}"] = (ordered < 0).any() | (ordered >= vocab).any()
        questions["teacher indices name a token twice in one row"] = (ordered[:, 1:] == ordered[:, :-1]).any()
    return questions


def raise_first(questions: dict[str, Tensor], answers: list[int]) -> None:
    """Raise ValueError with the first message whose answer, read back from the device, is yes."""
    for message, wrong in zip(questions, answers, strict=True):
        if wrong:
            raise ValueError(message)
