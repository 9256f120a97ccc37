"""The formulas of the distillation head in plain PyTorch: losses per token and gradients of given logits.

With p the student, q the teacher (both at temperature T) and r = log q - log p:

    forward_kl   KL(q || p) = sum q r - q + p
    reverse_kl   KL(p || q) = sum q - p - p r
    jsd          beta KL(q || m) + (1 - beta) KL(p || m),  m = beta q + (1 - beta) p
                 (Agarwal et al. 2024, arXiv:2306.13649, eq. 1)
    mse          mean over the entries of (d - mean d)^2,  d = (student - teacher logits) / T
                 (DER, Buzzega et al. 2020, arXiv:2004.07211)

Every KL is summed in Bregman form, whose terms p·(e^r r - e^r + 1) are all non-negative. The plain sum of q (log q -
log p) cancels: in fp32 it is wrong by 10 to 100 % and often negative once KL <= 1e-5. 0 log 0 is 0. A student that
gives no mass to a token that the teacher may emit has an infinite loss and a finite gradient.

Gradient: dD/dz_v = p_v (g_v - sum_e p_e g_e) with g = dD/dp. ``event_terms`` returns p·g and its sum, both for the full
vocabulary and for the k + 1 events of a top-k teacher. It has two forms of the same algebra: ``_near_terms`` writes q
as p·e^r with expm1 and is fast and exact while the ratios are moderate; ``_far_terms`` takes any ratio, also an
infinite one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from safecl.kernels.head.backend import RowOptions

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "mse")
# Log-ratios for which p·expm1(r) equals q - p to fp32: where p underflows, q is below 1e-25.
_NEAR_LOW, _NEAR_HIGH = -80.0, 30.0
_SERIES_LIMIT = 0.25  # below it the closed form of e^r r - e^r + 1 cancels; the series has an error of 2e-6
_GRADIENT_LOG_RATIO = 100.0  # replaces an infinite log-ratio in the gradient


class Scratch:
    """Named buffers that every block of rows uses again.

    The page faults of a fresh megabyte cost more time than the arithmetic on it.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, like: Tensor) -> Tensor:
        """Return an uninitialised buffer like ``like`` [rows, ...]; the same name gives the same memory."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape[0] < like.shape[0] or buffer.shape[1:] != like.shape[1:]:
            buffer = self._buffers[name] = torch.empty_like(like, memory_format=torch.contiguous_format)
        return buffer[: like.shape[0]]


class Softmax(NamedTuple):
    log_p: Tensor  # [rows, events]
    p: Tensor


def softmax(logits: Tensor, scratch: Scratch, name: str = "p") -> Softmax:
    """Return the softmax over the last dimension, in scratch buffers called ``name``."""
    log_p = torch.log_softmax(logits, -1, out=scratch(f"log {name}", logits))
    return Softmax(log_p, torch.exp(log_p, out=scratch(name, logits)))


class EventTerms(NamedTuple):
    loss: Tensor  # [rows]
    p: Tensor  # [rows, events], the student's probabilities
    p_grad: Tensor  # [rows, events], p·g
    total: Tensor | None  # [rows, 1], sum of p·g over the events; None where p_grad is already the gradient

    def gradient_(self) -> Tensor:
        """Return dD/dz of the events [rows, events]; overwrites p_grad."""
        return self.p_grad if self.total is None else self.p_grad.addcmul_(self.p, self.total, value=-1)


def event_terms(
    student: Softmax, log_q: Tensor, divergence: str, beta: float, normalised: bool, scratch: Scratch
) -> EventTerms:
    """Return the loss and the gradient terms of one divergence over the last dimension; log_q: [rows, events].

    normalised: whether p and q each sum to one (a softmax); then p == q gives a gradient of exactly zero.
    """
    ratio = torch.sub(log_q, student.log_p, out=scratch("ratio", log_q))
    low, high = ratio.aminmax() if ratio.numel() else (ratio.new_zeros(()), ratio.new_zeros(()))
    if normalised and low > _NEAR_LOW and high < _NEAR_HIGH:
        return _near_terms(student.p, ratio, divergence, beta, scratch)
    return _far_terms(student.p, log_q.exp(), ratio, divergence, beta, normalised)


def _near_terms(p: Tensor, r: Tensor, divergence: str, beta: float, scratch: Scratch) -> EventTerms:
    """Compute the terms with e = e^r - 1, so that q - p = p e; only p and r have rounding errors of first order."""
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
    """Compute the terms for any log-ratio r, also an infinite one."""
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
    """Compute the terms as a plain sum over a part of the support.

    p and q do not sum to one there, so the extra terms of the Bregman form would change the loss.
    """
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
    """Return q r - q + p elementwise, the non-negative terms of KL(q || p), for r = log q - log p."""
    r = log_ratio
    series = p * r * r * (1 / 2 + r * (1 / 3 + r * (1 / 8 + r * (1 / 30 + r / 144))))
    return torch.where(r.abs() < _SERIES_LIMIT, series, _silent(q, q * r) - q + p)


def mixture_log_ratios(log_ratio: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return (log p/m, log q/m) for m = beta q + (1 - beta) p, without cancellation for small and large r."""
    positive = log_ratio > 0
    weight = torch.full_like(log_ratio, beta).masked_fill(positive, 1 - beta)
    near = torch.log1p(weight * torch.expm1(-log_ratio.abs()))  # log m / max(p, q)
    return -torch.where(positive, near + log_ratio, near), -torch.where(positive, near, near - log_ratio)


def _slope(divergence: str, beta: float) -> float:
    return 1.0 if divergence == "reverse_kl" else 1 - beta


def _silent(probability: Tensor, term: Tensor) -> Tensor:
    """Return the term, and 0 where the probability is 0, since 0 log 0 = 0."""
    return torch.where(probability > 0, term, 0.0)


def _finite(log_ratio: Tensor) -> Tensor:
    return torch.nan_to_num(log_ratio, nan=0.0, posinf=_GRADIENT_LOG_RATIO, neginf=-_GRADIENT_LOG_RATIO)


def mse_terms(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return (loss [rows], gradient [rows, entries]) of the centred mean squared difference.

    Entries whose difference is not finite do not count.
    """
    difference = student - teacher
    valid = difference.isfinite()
    count = valid.sum(-1, keepdim=True, dtype=student.dtype).clamp(min=1)
    difference = torch.where(valid, difference, 0.0)
    centred = torch.where(valid, difference - difference.sum(-1, keepdim=True) / count, 0.0)
    return centred.square().sum(-1) / count[..., 0], centred * (2 / count)


def shape_logits_(raw: Tensor, logit_scale: float | None, softcap: float | None) -> Tensor:
    """Compute softcap·tanh(logit_scale·raw / softcap) in place; a -inf entry (a masked token) stays -inf."""
    if logit_scale is not None:
        raw.mul_(logit_scale)
    if softcap is None:
        return raw
    masked = raw == -math.inf
    raw.div_(softcap).tanh_().mul_(softcap)
    return raw.masked_fill_(masked, -math.inf)


def shape_backward_(grad: Tensor, logits: Tensor, logit_scale: float | None, softcap: float | None) -> Tensor:
    """Apply the chain rule of ``shape_logits_`` to ``grad`` in place; logits: the shaped ones."""
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
    """Return -log softmax(logits)[label] at temperature 1, and its gradient, which includes that of z_loss·logsumexp^2.

    A label below 0 or a weight of 0 means that there is no label. grad: a buffer for the gradient, or None.
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
    """Return (loss [rows], dD/d(student logits) [rows, shared vocab]) for shaped logits.

    Student and teacher share the first min(V_s, V_t) tokens. known: the softmax of ``student`` where it is already
    computed; used at T = 1 when all of the student's tokens are shared.
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
    """Return logits / T; at T = 1 the logits themselves."""
    return logits if options.temperature == 1 else torch.div(logits, options.temperature, out=scratch(name, logits))


def topk_divergence(
    student: Tensor, log_q: Tensor, indices: Tensor, log_tail: Tensor, options: RowOptions, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """Return (loss [rows], dD/d(student logits) [rows, vocab]) against a top-k teacher.

    student: shaped logits [rows, vocab].
    """
    if options.topk_mode == "uniform_tail" and options.divergence != "mse":
        spread = spread_tail(log_q, indices, log_tail, student.shape[-1])
        return dense_divergence(student, spread * options.temperature, options, scratch)
    z = at_temperature(student, options, scratch, "student at T")
    top = z.gather(-1, indices)  # [rows, k]
    rest = scratch("rest", z).copy_(z).scatter_(-1, indices, -math.inf)
    log_rest = torch.logsumexp(rest, -1, keepdim=True)
    loss, top_grad, rest_grad = topk_event_gradients(top, log_rest, log_q, log_tail, options)
    # share = p_v / p_tail; where no token is left, rest and log_rest are both -inf
    share = rest.sub_(torch.where(log_rest == -math.inf, 0.0, log_rest)).exp_()
    return loss, share.mul_(rest_grad).scatter_(-1, indices, top_grad)


def topk_event_gradients(
    top: Tensor, log_rest: Tensor | None, log_q: Tensor, log_tail: Tensor, options: RowOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss [rows] and the gradients of the stored tokens [rows, k] and of all others together [rows, 1].

    top: student logits / T at the stored tokens. log_rest: [rows, 1], logsumexp of all the others; None for
    "renormalised" and for mse, which do not use it. The gradients include the factor kd_scale / T.
    """
    divergence, beta, k = options.divergence, options.beta, top.shape[-1]
    if divergence == "mse":
        loss, grad = mse_terms(top, log_q)
    elif options.topk_mode == "renormalised":
        terms = event_terms(softmax(top, Scratch()), torch.log_softmax(log_q, -1), divergence, beta, True, Scratch())
        loss, grad = terms.loss, terms.gradient_()
    else:
        assert log_rest is not None
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
    """Return the teacher's log-probabilities over the whole vocabulary [rows, vocab], with the tail spread evenly."""
    others = max(vocab - indices.shape[-1], 1)
    spread = (log_tail - math.log(others))[:, None].expand(-1, vocab)
    return spread.scatter(-1, indices, log_q)
