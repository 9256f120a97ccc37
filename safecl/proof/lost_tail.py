"""Distilling from the k stored tokens alone drives a student away from its teacher.

    sum over the k stored v of q_v (log q_v - log p_v)      without the tail: least at p = q / sum q
                                + t (log t - log s)          t, s: mass of teacher and student on all other tokens

Without the tail the sum falls below zero as the student takes probability from the tokens that are not stored, and is
least where they have none. Here a student starts exactly at its teacher and descends each loss; the right result is
that it stays there. safecl stores the log of the tail's mass and compares k + 1 events.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from safecl.proof.finding import Finding

TOKENS, WIDTH, VOCAB, K = 32, 64, 2000, 16
STD = 2.0
STEPS, RATE = 50, 4.0


def measure() -> Finding:
    """Compare the drift under both losses. Every rank computes the same alone."""
    hidden, head = teacher_states()
    usual, ours = drift(by_stored_tokens(hidden, head), hidden, head), drift(by_safecl(hidden, head), hidden, head)
    return Finding(
        "lost-tail", f"top-{K} teacher stored without its tail", f"KL after {STEPS} steps that began at KL 0",
        "0.000", f"{usual:.3f}", f"{ours:.3f}", seen=usual > 0.01, holds=ours <= 1e-6,
    )  # fmt: skip


def teacher_states(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw (hidden states [TOKENS, WIDTH], head [VOCAB, WIDTH]), fp32."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS, WIDTH, generator=g), torch.randn(VOCAB, WIDTH, generator=g) * STD / WIDTH**0.5


def drift(loss: Callable[[Tensor], Tensor], hidden: Tensor, head: Tensor) -> float:
    """Return the mean KL over the whole vocabulary, in nats, after gradient descent on `loss` from the teacher."""
    student = hidden.clone().requires_grad_()
    for _ in range(STEPS):
        (grad,) = torch.autograd.grad(loss(student), student)
        student = (student - RATE * grad).detach().requires_grad_()
    log_p, log_q = ((x.double() @ head.double().T).log_softmax(-1) for x in (student.detach(), hidden))
    return float(F.kl_div(log_p, log_q, log_target=True, reduction="batchmean"))


def by_stored_tokens(hidden: Tensor, head: Tensor, with_tail: bool = False) -> Callable[[Tensor], Tensor]:
    """Return the usual loss: over the k log-probabilities gathered from a full softmax. The remedy, `with_tail`, adds
    the missing event."""
    log_q, indices = (hidden @ head.T).log_softmax(-1).topk(K)
    log_t = torch.log1p(-log_q.exp().sum(-1))

    def loss(student: Tensor) -> Tensor:
        log_p = (student @ head.T).log_softmax(-1).gather(-1, indices)
        total = F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
        if not with_tail:
            return total
        log_s = torch.log1p(-log_p.exp().sum(-1))
        return total + F.kl_div(log_s[:, None], log_t[:, None], log_target=True, reduction="batchmean")

    return loss


def by_safecl(hidden: Tensor, head: Tensor) -> Callable[[Tensor], Tensor]:
    """Return safecl's loss: the fused head with a stored teacher of k tokens and their tail."""
    from safecl.kernels import linear_distill_loss, linear_topk

    stored = linear_topk(hidden, head, K)
    return lambda student: linear_distill_loss(student, head, teacher=stored, kd_weights=1 / len(hidden)).loss
