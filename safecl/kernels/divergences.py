"""The row work of the distillation head in plain PyTorch: fp32 logits in, per-token losses and dlogits out.

With p the student, q the teacher (both at temperature T) and r = log q - log p:

    forward_kl   KL(q || p) = sum q r - q + p
    reverse_kl   KL(p || q) = sum q - p - p r
    jsd          beta KL(q || m) + (1 - beta) KL(p || m),  m = beta q + (1 - beta) p          (Agarwal et al. 2024, arXiv:2306.13649, eq. 1)
    mse          mean over the entries of (d - mean d)^2,  d = (student - teacher logits) / T  (DER, Buzzega et al. 2020, arXiv:2004.07211)

Every KL is summed in Bregman form, whose terms p·(e^r r - e^r + 1) are all non-negative: the plain sum of q (log q - log p) cancels, and
in fp32 is wrong by 10 to 100 % and often negative once KL <= 1e-5. 0 log 0 is 0; a student that gives no mass to what the teacher may say
has an infinite loss and a finite gradient.

Gradient: dD/dz_v = p_v (g_v - sum_e p_e g_e) with g = dD/dp. ``event_terms`` returns p·g and its sum, for the full vocabulary and for the
k + 1 events of a top-k teacher alike.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "mse")
_SERIES_LIMIT = 0.25  # below it the closed form of e^r r - e^r + 1 cancels; the series' own error is 2e-6
_GRADIENT_LOG_RATIO = 100.0  # stands for an infinite log-ratio in the gradient


class RowOptions(NamedTuple):
    """What the row work needs to know beside the tensors; ``kd_scale`` is the factor of temperature_scale (1 or T^2)."""

    divergence: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    kd_scale: float = 1.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float | None = None
    teacher_softcap: float | None = None
    teacher_logit_scale: float | None = None
    topk_mode: str = "tail"


class EventTerms(NamedTuple):
    loss: Tensor  # [rows]
    p_grad: Tensor  # [rows, events], p·g
    total: Tensor  # [rows, 1], sum of p·g over the events


def kl_terms(p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
    """q r - q + p elementwise, the non-negative terms of KL(q || p), for r = log q - log p."""
    r = log_ratio
    series = p * r * r * (1 / 2 + r * (1 / 3 + r * (1 / 8 + r * (1 / 30 + r / 144))))
    direct = torch.where(q > 0, q * r, 0.0) - q + p
    return torch.where(r.abs() < _SERIES_LIMIT, series, direct)


def mixture_log_ratios(log_ratio: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(log p/m, log q/m) of m = beta q + (1 - beta) p, without cancellation for small and large r = log q - log p."""
    positive = log_ratio > 0
    weight = torch.where(positive, 1 - beta, beta)
    near = torch.log1p(weight * torch.expm1(-log_ratio.abs()))  # log m / max(p, q)
    return -torch.where(positive, near + log_ratio, near), -torch.where(positive, near, near - log_ratio)


def event_terms(log_p: Tensor, log_q: Tensor, divergence: str, beta: float, normalised: bool, truncated: bool = False) -> EventTerms:
    """Loss and gradient terms of one divergence over the last dimension; log_p, log_q: [rows, events].

    normalised: q sums to one exactly (a softmax), so that p == q gives a gradient of exactly zero.
    truncated:  the events are only a part of p's support and the plain sum over them is wanted.
    """
    p, q = log_p.exp(), log_q.exp()
    r = log_q - log_p
    if divergence == "forward_kl":
        loss = torch.where(q > 0, q * r, 0.0) if truncated else kl_terms(p, q, r)
        total = -torch.ones_like(r[..., :1]) if normalised else -q.sum(-1, keepdim=True)
        return EventTerms(loss.sum(-1), -q, total)
    if divergence == "reverse_kl":
        gap = -_finite(r)
        p_grad = p * (gap + 1) if truncated else p * gap
        loss = torch.where(p > 0, -p * r, 0.0) if truncated else kl_terms(q, p, -r)
        return EventTerms(loss.sum(-1), p_grad, p_grad.sum(-1, keepdim=True))
    log_p_m, log_q_m = mixture_log_ratios(r, beta)
    m = beta * q + (1 - beta) * p
    loss = beta * kl_terms(m, q, log_q_m) + (1 - beta) * kl_terms(m, p, log_p_m)
    p_grad = (1 - beta) * p * _finite(log_p_m)
    return EventTerms(loss.sum(-1), p_grad, p_grad.sum(-1, keepdim=True))


def _finite(log_ratio: Tensor) -> Tensor:
    return torch.nan_to_num(log_ratio, nan=0.0, posinf=_GRADIENT_LOG_RATIO, neginf=-_GRADIENT_LOG_RATIO)


def mse_terms(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """(loss [rows], gradient [rows, entries]) of the centred mean squared difference; entries that are -inf on either side do not count."""
    difference = student - teacher
    valid = difference.isfinite()
    count = valid.sum(-1, keepdim=True).clamp(min=1)
    difference = torch.where(valid, difference, 0.0)
    centred = torch.where(valid, difference - difference.sum(-1, keepdim=True) / count, 0.0)
    return centred.square().sum(-1) / count[..., 0], centred * (2 / count)


def shape_logits_(raw: Tensor, logit_scale: float | None, softcap: float | None) -> Tensor:
    """softcap·tanh(logit_scale·raw / softcap) in place; a -inf entry (a masked token) stays -inf."""
    if logit_scale is not None:
        raw.mul_(logit_scale)
    if softcap is None:
        return raw
    masked = raw == -math.inf
    raw.div_(softcap).tanh_().mul_(softcap)
    return raw.masked_fill_(masked, -math.inf)


def shape_backward_(grad: Tensor, logits: Tensor, logit_scale: float | None, softcap: float | None) -> Tensor:
    """Chain rule of ``shape_logits_``, in place on grad; ``logits`` are the shaped ones."""
    if softcap is not None:
        slope = 1 - (logits / softcap).square()
        grad.mul_(torch.where(slope.isfinite(), slope, 0.0))
    return grad if logit_scale is None else grad.mul_(logit_scale)


class CrossEntropy(NamedTuple):
    loss: Tensor  # [rows], 0 without a label
    logsumexp: Tensor  # [rows], 0 without a label
    grad: Tensor | None  # [rows, vocab], weighted, z-loss included


def cross_entropy_terms(logits: Tensor, labels: Tensor, weights: Tensor, z_loss: float, needs_grad: bool) -> CrossEntropy:
    """-log softmax(logits)[label] at temperature 1, and z_loss·logsumexp^2 in the gradient; labels < 0 and weight 0 mean "no label"."""
    has_label = (labels >= 0) & (weights != 0)
    index = labels.clamp(min=0)[:, None]
    lse = torch.logsumexp(logits, -1)
    loss = torch.where(has_label, lse - logits.gather(-1, index)[:, 0], 0.0)
    grad = None
    if needs_grad:
        weights = torch.where(has_label, weights, 0.0)
        factor = weights * (1 + 2 * z_loss * lse)
        grad = (logits - lse[:, None]).exp_().mul_(torch.where(has_label, factor, 0.0)[:, None])
        grad.scatter_add_(-1, index, -weights[:, None])
    return CrossEntropy(loss, torch.where(has_label, lse, 0.0), grad)


def dense_divergence(student: Tensor, teacher: Tensor, options: RowOptions, needs_grad: bool = True) -> tuple[Tensor, Tensor | None]:
    """(loss [rows], dD/d(student logits) [rows, shared vocab]) for shaped logits; the first min(V_s, V_t) tokens are compared."""
    shared = min(student.shape[-1], teacher.shape[-1])
    z = student[:, :shared] / options.temperature
    y = teacher[:, :shared] / options.temperature
    if options.divergence == "mse":
        loss, grad = mse_terms(z, y)
    else:
        log_p, log_q = torch.log_softmax(z, -1), torch.log_softmax(y, -1)
        loss, p_grad, total = event_terms(log_p, log_q, options.divergence, options.beta, normalised=True)
        grad = p_grad.addcmul_(log_p.exp_(), total, value=-1) if needs_grad else None
    if needs_grad:
        grad.mul_(options.kd_scale / options.temperature)
    return loss * options.kd_scale, grad


def topk_divergence(student: Tensor, log_q: Tensor, indices: Tensor, log_tail: Tensor, options: RowOptions) -> tuple[Tensor, Tensor]:
    """(loss [rows], dD/d(student logits) [rows, vocab]) against a top-k teacher; student: shaped logits [rows, vocab]."""
    if options.topk_mode == "uniform_tail" and options.divergence != "mse":
        spread = spread_tail(log_q, indices, log_tail, student.shape[-1])
        return dense_divergence(student, spread * options.temperature, options)
    z = student / options.temperature
    top = z.gather(-1, indices)  # [rows, k]
    rest = z.scatter(-1, indices, -math.inf)
    log_rest = torch.logsumexp(rest, -1, keepdim=True)
    loss, top_grad, rest_grad = topk_event_gradients(top, log_rest, log_q, log_tail, options)
    share = torch.nan_to_num(rest - log_rest, nan=-math.inf).exp_()  # p_v / p_tail; an empty rest is all -inf
    grad = share.mul_(rest_grad).scatter_(-1, indices, top_grad)
    return loss, grad


def topk_event_gradients(top: Tensor, log_rest: Tensor | None, log_q: Tensor, log_tail: Tensor, options: RowOptions):
    """(loss [rows], gradient of the stored tokens [rows, k], gradient of all other tokens together [rows, 1]), scaled by kd_scale / T.

    top: student logits / T at the stored tokens; log_rest: [rows, 1], logsumexp of all the others (unused by "renormalised" and mse).
    """
    scale = options.kd_scale / options.temperature
    none = torch.zeros_like(top[:, :1])
    if options.divergence == "mse":
        loss, grad = mse_terms(top, log_q)
        return loss * options.kd_scale, grad * scale, none
    if options.topk_mode == "renormalised":
        log_p, log_q = torch.log_softmax(top, -1), torch.log_softmax(log_q, -1)
        terms = event_terms(log_p, log_q, options.divergence, options.beta, normalised=True)
        return terms.loss * options.kd_scale, (terms.p_grad - log_p.exp() * terms.total) * scale, none
    log_p = torch.cat([top, log_rest], -1)
    log_p = log_p - torch.logsumexp(log_p, -1, keepdim=True)  # [rows, k + 1]
    if options.topk_mode == "truncated":
        terms = event_terms(log_p[:, :-1], log_q, options.divergence, options.beta, normalised=False, truncated=True)
        p_grad = torch.cat([terms.p_grad, none], -1)
    else:
        log_q = torch.cat([log_q, log_tail[:, None]], -1)
        terms = event_terms(log_p, log_q, options.divergence, options.beta, normalised=False)
        p_grad = terms.p_grad
    grad = (p_grad - log_p.exp() * terms.total) * scale
    return terms.loss * options.kd_scale, grad[:, :-1], grad[:, -1:]


def spread_tail(log_q: Tensor, indices: Tensor, log_tail: Tensor, vocab: int) -> Tensor:
    """The teacher's log-probabilities over the whole vocabulary [rows, vocab] with the tail spread evenly."""
    others = max(vocab - indices.shape[-1], 1)
    spread = (log_tail - math.log(others))[:, None].expand(-1, vocab)
    return spread.scatter(-1, indices, log_q)


class RowLosses(NamedTuple):
    ce: Tensor  # [rows], unweighted
    kd: Tensor  # [rows], unweighted, times kd_scale
    logsumexp: Tensor  # [rows], 0 where there is no label


def dense_rows(student, teacher, labels, ce_weights, kd_weights, options: RowOptions, dlogits=None) -> RowLosses:
    """One tile of raw logits: losses per row, and the weighted gradient of the raw logits written to ``dlogits``.

    student: [rows, vocab] fp32, overwritten. teacher: [rows, teacher_vocab] or None. labels: [rows] int64, negative = none; or None.
    ce_weights, kd_weights: [rows]. dlogits: [rows, vocab] of any floating dtype (it may be ``student`` itself), or None for losses only.
    """

    def divergence(logits, block):
        shaped = shape_logits_(teacher[block].to(logits.dtype, copy=True), options.teacher_logit_scale, options.teacher_softcap)
        return dense_divergence(logits, shaped, options, dlogits is not None)

    return _row_blocks(student, labels, ce_weights, kd_weights, options, dlogits, divergence if teacher is not None else None)


def topk_rows(student, log_q, indices, log_tail, labels, ce_weights, kd_weights, options: RowOptions, dlogits=None) -> RowLosses:
    """``dense_rows`` against a top-k teacher; log_q, indices: [rows, k], log_tail: [rows]."""

    def divergence(logits, block):
        return topk_divergence(logits, log_q[block].to(logits.dtype), indices[block], log_tail[block].to(logits.dtype), options)

    return _row_blocks(student, labels, ce_weights, kd_weights, options, dlogits, divergence)


_BLOCK_ELEMENTS = 2**18  # a block and its temporaries stay in the processor's cache


def _row_blocks(student, labels, ce_weights, kd_weights, options, dlogits, divergence) -> RowLosses:
    rows, vocab = student.shape
    step = max(1, _BLOCK_ELEMENTS // vocab)
    losses = student.new_zeros(3, rows)
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        logits = shape_logits_(student[block], options.logit_scale, options.softcap)
        grad = None
        if labels is not None:
            losses[0, block], losses[2, block], grad = cross_entropy_terms(
                logits, labels[block], ce_weights[block], options.z_loss, dlogits is not None
            )
        if divergence is not None:
            losses[1, block], kd_grad = divergence(logits, block)
            if dlogits is not None:
                grad = _add_divergence(grad, kd_grad.mul_(kd_weights[block, None]), vocab)
        if dlogits is not None:
            dlogits[block] = shape_backward_(grad, logits, options.logit_scale, options.softcap)
    return RowLosses(*losses)


def _add_divergence(grad: Tensor | None, kd_grad: Tensor, vocab: int) -> Tensor:
    if grad is None:
        return torch.nn.functional.pad(kd_grad, (0, vocab - kd_grad.shape[-1]))
    grad[:, : kd_grad.shape[-1]] += kd_grad
    return grad
