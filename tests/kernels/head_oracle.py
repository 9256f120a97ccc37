"""The distillation head in fp64 from its definition: [tokens, vocab] in memory, plain sums, autograd. No code of
safecl/kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One combination of shapes and options. drift: how far the teacher's hidden states are from the student's; std: of
    the logits."""

    tokens: int = 13
    width: int = 24
    vocab: int = 1000
    dtype: torch.dtype = torch.float32
    divergence: str = "forward_kl"
    beta: float = 0.3
    temperature: float = 1.0
    temperature_scale: str = "none"
    bias: bool = False
    softcap: float | None = None
    logit_scale: float | None = None
    z_loss: float = 0.0
    labels: str = "some"  # some | all | none | ignored
    teacher: str | None = "dense"  # dense | logits | topk
    teacher_rows: str = "some"  # some | all
    teacher_width: int | None = None
    teacher_vocab: int | None = None
    k: int = 20
    mode: str = "tail"
    drift: float = 0.1
    std: float = 4.0
    tile_rows: int | None = None  # None: the default budget
    seed: int = 0

    def but(self, **changes) -> Case:
        return replace(self, **changes)


@dataclass
class Inputs:
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor | None
    ce_weights: Tensor
    kd_weights: Tensor
    teacher_rows: Tensor | None
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None

    def to(self, device: str) -> Inputs:
        return Inputs(*(None if tensor is None else tensor.to(device) for tensor in vars(self).values()))


def make_inputs(case: Case) -> Inputs:
    g = torch.Generator().manual_seed(case.seed)
    normal = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    hidden = normal(case.tokens, case.width)
    weight = normal(case.vocab, case.width) * case.std / case.width**0.5
    bias = normal(case.vocab) if case.bias else None
    rows = None
    if case.teacher and case.teacher_rows == "some":
        rows = torch.randperm(case.tokens, generator=g)[: max(1, case.tokens // 2)]
    kd_weights = normal(case.tokens)
    inputs = Inputs(
        hidden.to(case.dtype),
        weight.to(case.dtype),
        None if bias is None else bias.to(case.dtype),
        _labels(case, g),
        normal(case.tokens),
        kd_weights,
        rows,
        None,
        None,
        None,
    )
    if case.teacher:
        _make_teacher(case, inputs, normal)
    return inputs


def _labels(case: Case, g: torch.Generator) -> Tensor | None:
    if case.labels == "none":
        return None
    labels = torch.randint(0, case.vocab, (case.tokens,), generator=g)
    if case.labels == "some":
        labels[1::3] = -100
    if case.labels == "ignored":
        labels[:] = -100
    return labels


def _make_teacher(case: Case, inputs: Inputs, normal) -> None:
    chosen = inputs.hidden if inputs.teacher_rows is None else inputs.hidden[inputs.teacher_rows]
    weight, bias = inputs.weight.float(), inputs.bias
    if case.teacher_width is not None:  # another model: its own head, unrelated logits
        chosen, weight = (
            normal(chosen.shape[0], case.teacher_width),
            normal(case.vocab, case.teacher_width) * case.std / case.teacher_width**0.5,
        )
    if case.teacher_vocab is not None:
        extra = max(0, case.teacher_vocab - case.vocab)
        weight = torch.cat([weight, normal(extra, weight.shape[1])])[: case.teacher_vocab]
        bias = None
    inputs.teacher_hidden = (chosen.float() + case.drift * normal(*chosen.shape)).to(case.dtype)
    inputs.teacher_weight, inputs.teacher_bias = weight.to(case.dtype), bias


@dataclass
class Truth:
    loss: Tensor
    ce: Tensor
    kd: Tensor
    logsumexp: Tensor
    grads: dict[str, Tensor]


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, case: Case) -> Tensor:
    z = hidden.double() @ weight.double().T
    if bias is not None:
        z = z + bias.double()
    if case.logit_scale is not None:
        z = z * case.logit_scale
    return z if case.softcap is None else case.softcap * torch.tanh(z / case.softcap)


def teacher_logits(case: Case, inputs: Inputs) -> Tensor:
    return logits_of(inputs.teacher_hidden, inputs.teacher_weight, inputs.teacher_bias, case)


def divergence(log_p: Tensor, log_q: Tensor, case: Case) -> Tensor:
    """D per row from normalised (or, truncated, partial) log-probabilities: p the student, q the teacher."""
    p, q = log_p.exp(), log_q.exp()
    if case.divergence == "forward_kl":
        return (q * (log_q - log_p)).sum(-1)
    if case.divergence == "reverse_kl":
        return (p * (log_p - log_q)).sum(-1)
    m = case.beta * q + (1 - case.beta) * p
    return case.beta * (q * (log_q - m.log())).sum(-1) + (1 - case.beta) * (p * (log_p - m.log())).sum(-1)


def centred_mse(z: Tensor, y: Tensor) -> Tensor:
    gap = z - y
    return (gap - gap.mean(-1, keepdim=True)).square().mean(-1)


def dense_kd(z: Tensor, y: Tensor, case: Case) -> Tensor:
    shared = min(z.shape[-1], y.shape[-1])
    z, y = z[:, :shared] / case.temperature, y[:, :shared] / case.temperature
    if case.divergence == "mse":
        return centred_mse(z, y)
    return divergence(z.log_softmax(-1), y.log_softmax(-1), case)


def topk_kd(z: Tensor, log_q: Tensor, indices: Tensor, log_tail: Tensor, case: Case) -> Tensor:
    """z: [rows, vocab] student logits; log_q [rows, k] and log_tail [rows] of the teacher at the temperature."""
    log_p = (z / case.temperature).log_softmax(-1)
    if case.divergence == "mse":
        return centred_mse(z.gather(1, indices) / case.temperature, log_q)
    stored = log_p.gather(1, indices)
    if case.mode == "truncated":
        return divergence(stored, log_q, case)
    if case.mode == "renormalised":
        return divergence(stored.log_softmax(-1), log_q.log_softmax(-1), case)
    total = torch.logsumexp(
        torch.cat([log_q, log_tail[:, None]], 1), -1, keepdim=True
    )  # a stored teacher is normalised to its own rounding
    log_q, log_tail = log_q - total, log_tail - total[:, 0]
    keep = torch.ones_like(log_p).scatter(1, indices, 0.0)
    if case.mode == "uniform_tail":
        spread = log_tail[:, None] - torch.log(keep.sum(1, keepdim=True))
        return divergence(log_p, spread.expand_as(log_p).scatter(1, indices, log_q), case)
    if not keep.any():
        return divergence(stored, log_q, case)
    tail = (log_p.exp() * keep).sum(1, keepdim=True).log()
    return divergence(torch.cat([stored, tail], 1), torch.cat([log_q, log_tail[:, None]], 1), case)


def truth(case: Case, inputs: Inputs, stored: tuple[Tensor, Tensor, Tensor] | None = None) -> Truth:
    """Losses and gradients of the case; stored: (log_q, indices, log_tail) of a top-k teacher."""
    present = [name for name in ("hidden", "weight", "bias") if getattr(inputs, name) is not None]
    leaves = {name: getattr(inputs, name).detach().double().clone().requires_grad_() for name in present}
    z = logits_of(leaves["hidden"], leaves["weight"], leaves.get("bias"), case)
    zeros = torch.zeros(case.tokens, dtype=torch.float64)
    ce, lse, kd = zeros, zeros, zeros
    if inputs.labels is not None:
        kept = inputs.labels != -100
        nll = -z.log_softmax(-1).gather(1, inputs.labels.clamp(min=0)[:, None])[:, 0]
        ce, lse = torch.where(kept, nll, 0.0), torch.where(kept, torch.logsumexp(z, -1), 0.0)
    if case.teacher:
        rows = torch.arange(case.tokens) if inputs.teacher_rows is None else inputs.teacher_rows
        if stored is not None:
            part = topk_kd(z[rows], *(t.double() if t.is_floating_point() else t for t in stored), case)
        else:
            part = dense_kd(z[rows], teacher_logits(case, inputs), case)
        kd = zeros.index_add(0, rows, part) * (case.temperature**2 if case.temperature_scale == "square" else 1.0)
    loss = (inputs.ce_weights.double() * (ce + case.z_loss * lse.square())).sum() + (
        inputs.kd_weights.double() * kd
    ).sum()
    if not loss.requires_grad:
        return Truth(loss, ce, kd, lse, {name: torch.zeros_like(leaf) for name, leaf in leaves.items()})
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    grads = {
        name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in zip(leaves.items(), grads, strict=True)
    }
    return Truth(loss.detach(), ce.detach(), kd.detach(), lse.detach(), grads)
