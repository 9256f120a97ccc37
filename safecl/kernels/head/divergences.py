"""The row work of the distillation head in plain PyTorch: fp32 logits in, per-token losses and dlogits out.

With p the student, q the teacher (both at temperature T) and r = log q - log p:

    forward_kl   KL(q || p) = sum q r - q + p
    reverse_kl   KL(p || q) = sum q - p - p r
    jsd          beta KL(q || m) + (1 - beta) KL(p || m),  m = beta q + (1 - beta) p          (Agarwal et al. 2024, arXiv:2306.13649, eq. 1)
    mse          mean over the entries of (d - mean d)^2,  d = (student - teacher logits) / T  (DER, Buzzega et al. 2020, arXiv:2004.07211)

Every KL is summed in Bregman form, whose terms p·(e^r r - e^r + 1) are all non-negative: the plain sum of q (log q -
log p) cancels, and in fp32 is wrong by 10 to 100 % and often negative once KL <= 1e-5. 0 log 0 is 0; a student that
gives no mass to what the teacher may say has an infinite loss and a finite gradient.

Gradient: dD/dz_v = p_v (g_v - sum_e p_e g_e) with g = dD/dp. ``event_terms`` returns p·g and its sum, for the full
vocabulary and for the k + 1 events of a top-k teacher alike. Two forms of the same algebra: ``_near_terms`` writes q as
p·e^r with expm1 and is fast and exact while the ratios are moderate; ``_far_terms`` takes any ratio, infinities
included.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from safecl.kernels.spans import spans

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "mse")
_NEAR_LOW, _NEAR_HIGH = (
    -80.0,
    30.0,
)  # where p·expm1(r) is q - p to fp32: a p that underflows then belongs to a q below 1e-25
_SERIES_LIMIT = 0.25  # below it the closed form of e^r r - e^r + 1 cancels; the series' own error is 2e-6
_GRADIENT_LOG_RATIO = 100.0  # stands for an infinite log-ratio in the gradient
_BLOCK_ELEMENTS = 2**18


class RowOptions(NamedTuple):
    """What the row work needs to know beside the tensors; ``kd_scale`` is the factor of temperature_scale (1 or
    T^2)."""

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


class Scratch:
    """Named buffers that are used again for every few rows: a fresh megabyte costs more in page faults than the
    arithmetic on it."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, like: Tensor) -> Tensor:
        """An uninitialised buffer of the shape and dtype of ``like`` [rows, ...]; the same memory under the same
        name."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape[0] < like.shape[0] or buffer.shape[1:] != like.shape[1:]:
            buffer = self._buffers[name] = torch.empty_like(like, memory_format=torch.contiguous_format)
        return buffer[: like.shape[0]]


class Softmax(NamedTuple):
    log_p: Tensor  # [rows, events]
    p: Tensor


def softmax(logits: Tensor, scratch: Scratch, name: str = "p") -> Softmax:
    """Over the last dimension, in buffers of ``name``."""
    log_p = torch.log_softmax(logits, -1, out=scratch(f"log {name}", logits))
    return Softmax(log_p, torch.exp(log_p, out=scratch(name, logits)))


class EventTerms(NamedTuple):
    loss: Tensor  # [rows]
    p: Tensor  # [rows, events], the student's probabilities
    p_grad: Tensor  # [rows, events], p·g
    total: Tensor | None  # [rows, 1], sum of p·g over the events; None: p_grad is the gradient already

    def gradient_(self) -> Tensor:
        """dD/dz of the events [rows, events], in place of p_grad."""
        return self.p_grad if self.total is None else self.p_grad.addcmul_(self.p, self.total, value=-1)


def event_terms(
    student: Softmax, log_q: Tensor, divergence: str, beta: float, normalised: bool, scratch: Scratch
) -> EventTerms:
    """Loss and gradient terms of one divergence over the last dimension; log_q: [rows, events].

    normalised: p and q each sum to one (a softmax), so that p == q gives a gradient of exactly zero.
    """
    ratio = torch.sub(log_q, student.log_p, out=scratch("ratio", log_q))
    low, high = ratio.aminmax() if ratio.numel() else (ratio.new_zeros(()), ratio.new_zeros(()))
    if normalised and low > _NEAR_LOW and high < _NEAR_HIGH:
        return _near_terms(student.p, ratio, divergence, beta, scratch)
    return _far_terms(student.p, log_q.exp(), ratio, divergence, beta, normalised)


def _near_terms(p: Tensor, r: Tensor, divergence: str, beta: float, scratch: Scratch) -> EventTerms:
    """With e = e^r - 1, so that q - p = p e: no term but p and r carries a rounding error of first order."""
    e = torch.expm1(r, out=scratch("expm1", r))
    terms, p_grad = scratch("terms", r), scratch("p_grad", r)
    if divergence == "forward_kl":
        loss = torch.sub(r, e, out=terms).addcmul_(e, r).mul_(p).sum(-1)  # p (e r + r - e)
        return EventTerms(loss.clamp_(min=0), p, torch.mul(p, e, out=p_grad).neg_(), None)
    if divergence == "reverse_kl":
        loss = torch.sub(e, r, out=terms).mul_(p).sum(-1)  # p (e - r)
        torch.mul(r, p, out=p_grad).neg_()
    else:
        u = torch.mul(e, beta, out=terms).log1p_()  # log m / p
        torch.mul(u, p, out=p_grad).mul_(beta - 1)
        to_teacher = e.add_(1).mul_(r.sub_(u)).mul_(p)  # q log q / m
        loss = p_grad.sum(-1) + beta * to_teacher.sum(-1)
    return EventTerms(loss.clamp_(min=0), p, p_grad, p_grad.sum(-1, keepdim=True))


def _far_terms(p: Tensor, q: Tensor, r: Tensor, divergence: str, beta: float, normalised: bool) -> EventTerms:
    if divergence == "forward_kl":
        total = -torch.ones_like(r[..., :1]) if normalised else -q.sum(-1, keepdim=True)
        return EventTerms(kl_terms(p, q, r).sum(-1), p, -q, total)
    if divergence == "reverse_kl":
        loss, log_p_ratio = kl_terms(q, p, -r), -r
    else:
        log_p_ratio, log_q_ratio = mixture_log_ratios(r, beta)
        m = beta * q + (1 - beta) * p
        loss = beta * kl_terms(m, q, log_q_ratio) + (1 - beta) * kl_terms(m, p, log_p_ratio)
    p_grad = _slope(divergence, beta) * p * _finite(log_p_ratio)
    return EventTerms(loss.sum(-1), p, p_grad, p_grad.sum(-1, keepdim=True))


def truncated_terms(log_p: Tensor, log_q: Tensor, divergence: str, beta: float) -> EventTerms:
    """The plain sum over a part of the support: where p and q do not sum to one, Bregman's extra terms would change the
    loss."""
    p, q, r = log_p.exp(), log_q.exp(), log_q - log_p
    if divergence == "forward_kl":
        return EventTerms(_silent(q, q * r).sum(-1), p, -q, -q.sum(-1, keepdim=True))
    if divergence == "reverse_kl":
        loss, p_grad = _silent(p, -p * r), p * (1 - _finite(r))
    else:
        log_p_ratio, log_q_ratio = mixture_log_ratios(r, beta)
        loss = beta * _silent(q, q * log_q_ratio) + (1 - beta) * _silent(p, p * log_p_ratio)
        p_grad = (1 - beta) * p * _finite(log_p_ratio)
    return EventTerms(loss.sum(-1), p, p_grad, p_grad.sum(-1, keepdim=True))


def kl_terms(p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
    """q r - q + p elementwise, the non-negative terms of KL(q || p), for r = log q - log p."""
    r = log_ratio
    series = p * r * r * (1 / 2 + r * (1 / 3 + r * (1 / 8 + r * (1 / 30 + r / 144))))
    return torch.where(r.abs() < _SERIES_LIMIT, series, _silent(q, q * r) - q + p)


def mixture_log_ratios(log_ratio: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(log p/m, log q/m) of m = beta q + (1 - beta) p, without cancellation for small and large r = log q - log p."""
    positive = log_ratio > 0
    weight = torch.full_like(log_ratio, beta).masked_fill(positive, 1 - beta)
    near = torch.log1p(weight * torch.expm1(-log_ratio.abs()))  # log m / max(p, q)
    return -torch.where(positive, near + log_ratio, near), -torch.where(positive, near, near - log_ratio)


def _slope(divergence: str, beta: float) -> float:
    return 1.0 if divergence == "reverse_kl" else 1 - beta


def _silent(probability: Tensor, term: Tensor) -> Tensor:
    """0 log 0 = 0."""
    return torch.where(probability > 0, term, 0.0)


def _finite(log_ratio: Tensor) -> Tensor:
    return torch.nan_to_num(log_ratio, nan=0.0, posinf=_GRADIENT_LOG_RATIO, neginf=-_GRADIENT_LOG_RATIO)


def mse_terms(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """(loss [rows], gradient [rows, entries]) of the centred mean squared difference; entries that are infinite on a
    side do not count."""
    difference = student - teacher
    valid = difference.isfinite()
    count = valid.sum(-1, keepdim=True, dtype=student.dtype).clamp(min=1)
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


def cross_entropy_terms(
    logits: Tensor, student: Softmax, labels: Tensor, weights: Tensor, z_loss: float, grad: Tensor | None
) -> CrossEntropy:
    """-log softmax(logits)[label] at temperature 1, and z_loss·logsumexp^2 in the gradient; labels < 0 and weight 0
    mean "no label".

    grad: a buffer for the gradient, or None.
    """
    has_label = (labels >= 0) & (weights != 0)
    index = labels.clamp(min=0)[:, None]
    lse = logits.amax(-1) - student.log_p.amax(-1)
    loss = torch.where(has_label, -student.log_p.gather(-1, index)[:, 0], 0.0)
    if grad is not None:
        factor = torch.where(has_label, weights * (1 + 2 * z_loss * lse), 0.0)
        torch.mul(student.p, factor[:, None], out=grad)
        grad.scatter_add_(-1, index, -torch.where(has_label, weights, 0.0)[:, None])
    return CrossEntropy(loss, torch.where(has_label, lse, 0.0), grad)


def dense_divergence(
    student: Tensor, teacher: Tensor, options: RowOptions, scratch: Scratch, known: Softmax | None = None
) -> tuple[Tensor, Tensor]:
    """(loss [rows], dD/d(student logits) [rows, shared vocab]) for shaped logits; the first min(V_s, V_t) tokens are
    compared.

    known: the softmax of ``student`` where there is one; it serves at T = 1 over the whole vocabulary.
    """
    shared = min(student.shape[-1], teacher.shape[-1])
    z = at_temperature(student[:, :shared], options, scratch, "student at T")
    y = at_temperature(teacher[:, :shared], options, scratch, "teacher at T")
    if options.divergence == "mse":
        loss, grad = mse_terms(z, y)
    else:
        if known is None or options.temperature != 1 or shared != student.shape[-1]:
            known = softmax(z, scratch, "p at T")
        log_q = torch.log_softmax(y, -1, out=scratch("log teacher", y))
        terms = event_terms(known, log_q, options.divergence, options.beta, True, scratch)
        loss, grad = terms.loss, terms.gradient_()
    scale = options.kd_scale / options.temperature
    return loss * options.kd_scale, grad if scale == 1 else grad.mul_(scale)


def at_temperature(logits: Tensor, options: RowOptions, scratch: Scratch, name: str) -> Tensor:
    """logits / T, the logits themselves at T = 1."""
    return logits if options.temperature == 1 else torch.div(logits, options.temperature, out=scratch(name, logits))


def topk_divergence(
    student: Tensor, log_q: Tensor, indices: Tensor, log_tail: Tensor, options: RowOptions, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """(loss [rows], dD/d(student logits) [rows, vocab]) against a top-k teacher; student: shaped logits [rows,
    vocab]."""
    if options.topk_mode == "uniform_tail" and options.divergence != "mse":
        spread = spread_tail(log_q, indices, log_tail, student.shape[-1])
        return dense_divergence(student, spread * options.temperature, options, scratch)
    z = at_temperature(student, options, scratch, "student at T")
    top = z.gather(-1, indices)  # [rows, k]
    rest = scratch("rest", z).copy_(z).scatter_(-1, indices, -math.inf)
    log_rest = torch.logsumexp(rest, -1, keepdim=True)
    loss, top_grad, rest_grad = topk_event_gradients(top, log_rest, log_q, log_tail, options)
    # p_v / p_tail; where no token is left, rest and log_rest are both -inf
    share = rest.sub_(torch.where(log_rest == -math.inf, 0.0, log_rest)).exp_()
    return loss, share.mul_(rest_grad).scatter_(-1, indices, top_grad)


def topk_event_gradients(top: Tensor, log_rest: Tensor | None, log_q: Tensor, log_tail: Tensor, options: RowOptions):
    """(loss [rows], gradient of the stored tokens [rows, k], gradient of all other tokens together [rows, 1]), scaled
    by kd_scale / T.

    top: student logits / T at the stored tokens; log_rest: [rows, 1], logsumexp of all the others (unused by
    "renormalised" and mse).
    """
    divergence, beta, k = options.divergence, options.beta, top.shape[-1]
    if divergence == "mse":
        loss, grad = mse_terms(top, log_q)
    elif options.topk_mode == "renormalised":
        terms = event_terms(softmax(top, Scratch()), torch.log_softmax(log_q, -1), divergence, beta, True, Scratch())
        loss, grad = terms.loss, terms.gradient_()
    else:
        log_p = torch.cat([top, log_rest], -1)
        log_p = log_p - torch.logsumexp(log_p, -1, keepdim=True)  # [rows, k + 1]
        if options.topk_mode == "truncated":
            terms = truncated_terms(log_p[:, :k], log_q, divergence, beta)
            terms = terms._replace(p=log_p.exp(), p_grad=torch.nn.functional.pad(terms.p_grad, (0, 1)))
        else:
            student = Softmax(log_p, log_p.exp())
            terms = event_terms(student, torch.cat([log_q, log_tail[:, None]], -1), divergence, beta, False, Scratch())
        loss, grad = terms.loss, terms.gradient_()
    grad = grad * (options.kd_scale / options.temperature)
    return loss * options.kd_scale, grad[:, :k], grad[:, k:] if grad.shape[-1] > k else torch.zeros_like(grad[:, :1])


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

    student: [rows, vocab], overwritten where it is fp32 and scaled or capped. teacher: [rows, teacher_vocab] or None.
    labels: [rows] int64, negative = none; or None.
    ce_weights, kd_weights: [rows]. dlogits: [rows, vocab] of any floating dtype (it may be ``student`` itself), or None
    for losses only.
    """
    shaped_in_place = options.teacher_logit_scale is not None or options.teacher_softcap is not None

    def divergence(logits, known, block, scratch):
        raw = teacher[block].to(logits.dtype, copy=shaped_in_place)
        shaped = shape_logits_(raw, options.teacher_logit_scale, options.teacher_softcap)
        return dense_divergence(logits, shaped, options, scratch, known)

    return _row_blocks(
        student, labels, ce_weights, kd_weights, options, dlogits, divergence if teacher is not None else None
    )


def topk_rows(
    student, log_q, indices, log_tail, labels, ce_weights, kd_weights, options: RowOptions, dlogits=None
) -> RowLosses:
    """``dense_rows`` against a top-k teacher; log_q, indices: [rows, k], log_tail: [rows]."""

    def divergence(logits, known, block, scratch):
        return topk_divergence(
            logits, log_q[block].to(logits.dtype), indices[block], log_tail[block].to(logits.dtype), options, scratch
        )

    return _row_blocks(student, labels, ce_weights, kd_weights, options, dlogits, divergence)


def _row_blocks(student, labels, ce_weights, kd_weights, options, dlogits, divergence) -> RowLosses:
    """A few rows at a time, so that they and their temporaries stay in the processor's cache."""
    rows, vocab = student.shape
    dtype = torch.promote_types(student.dtype, torch.float32)
    losses = student.new_zeros(3, rows, dtype=dtype)
    scratch = Scratch()
    for start, end in spans(rows, max(1, _BLOCK_ELEMENTS // vocab)):
        block = slice(start, end)
        logits = shape_logits_(student[block].to(dtype), options.logit_scale, options.softcap)
        grad = kd_grad = known = None
        if labels is not None:
            known = softmax(logits, scratch)
            grad = None if dlogits is None else scratch("grad", logits)
            ce = cross_entropy_terms(logits, known, labels[block], ce_weights[block], options.z_loss, grad)
            losses[0, block], losses[2, block], grad = ce
        if divergence is not None:
            losses[1, block], kd_grad = divergence(logits, known, block, scratch)
        if dlogits is not None:
            grad = _weighted_gradient(grad, kd_grad, kd_weights, block, vocab)
            dlogits[block] = shape_backward_(grad, logits, options.logit_scale, options.softcap)
    return RowLosses(*losses)


def _weighted_gradient(
    grad: Tensor | None, kd_grad: Tensor | None, kd_weights: Tensor, block: slice, vocab: int
) -> Tensor:
    """Gradient of the cross-entropy (weighted already) plus that of the divergence; a teacher's narrower vocabulary
    comes first."""
    if kd_grad is None:
        return grad
    weights = kd_weights[block, None]
    if grad is None:
        return torch.nn.functional.pad(kd_grad.mul_(weights), (0, vocab - kd_grad.shape[-1]))
    grad[:, : kd_grad.shape[-1]].addcmul_(kd_grad, weights)
    return grad
