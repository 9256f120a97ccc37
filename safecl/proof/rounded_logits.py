"""Near the teacher the gradient of a distillation loss from bf16 logits is mostly rounding.

    d KL(q || p) / d logits = p - q

A bf16 number has 8 significant bits, so a logit of 20 is off by up to 0.06. Cross-entropy tolerates that. But near the
teacher p - q is smaller than the error that rounding makes in p and q. At a KL of about 1e-3, where a student that must
not forget always is, more than half of the gradient is wrong. safecl's head forms the difference in fp32, tile by tile,
and rounds after that.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from safecl.proof.finding import Finding

TOKENS, WIDTH, VOCAB = 64, 128, 4000
DISTANCE = 1e-3
"""Mean KL from the teacher, in nats."""
STD = 4.0
"""Standard deviation of the logits, as in trained models."""
BOUND = 0.02
"""Largest error that counts as right. Inputs and gradients are bf16, so half a percent is the best possible."""


def measure() -> Finding:
    """Compare both gradients with the exact one. Every rank computes the same alone."""
    case = student_near_teacher()
    right = exact(*case)
    usual, ours = error(by_rounded_logits(*case), right), error(by_safecl(*case), right)
    return Finding(
        "rounded-logits", "distillation from bf16 logits", f"error of the gradient at KL {DISTANCE:g}",
        "0 %", f"{100 * usual:.0f} %", f"{100 * ours:.1f} %", seen=usual > 0.3, holds=ours <= BOUND,
    )  # fmt: skip


def error(gradient: Tensor, right: Tensor) -> float:
    """Return the relative norm of the difference."""
    return float((gradient.double() - right).norm() / right.norm())


def student_near_teacher(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Draw student's hidden states and head in bf16, and teacher's hidden states in fp32 at a mean KL of DISTANCE."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, WIDTH, generator=g).bfloat16()
    head = (torch.randn(VOCAB, WIDTH, generator=g) * STD / WIDTH**0.5).bfloat16()
    direction, drift = torch.randn(TOKENS, WIDTH, generator=g), DISTANCE**0.5
    for _ in range(6):
        teacher = hidden.float() + drift * direction
        drift *= (DISTANCE / float(_kl(hidden.double(), head, teacher))) ** 0.5
    return hidden, head, teacher


def _kl(hidden: Tensor, head: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean KL in fp64."""
    log_p, log_q = ((x @ head.double().T).log_softmax(-1) for x in (hidden, teacher.double()))
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


def exact(hidden: Tensor, head: Tensor, teacher: Tensor) -> Tensor:
    """Compute the gradient of the hidden states in fp64."""
    leaf = hidden.double().requires_grad_()
    return torch.autograd.grad(_kl(leaf, head, teacher), leaf)[0]


def by_rounded_logits(hidden: Tensor, head: Tensor, teacher: Tensor, logits: torch.dtype = torch.bfloat16) -> Tensor:
    """Compute it in the usual way: both models' logits in bf16, softmax and KL in fp32. The remedy is
    `logits=torch.float32`."""
    leaf = hidden.clone().requires_grad_()
    log_q = (teacher @ head.float().T).to(logits).float().log_softmax(-1)
    log_p = F.linear(leaf.to(logits), head.to(logits)).float().log_softmax(-1)
    return torch.autograd.grad(F.kl_div(log_p, log_q, log_target=True, reduction="batchmean"), leaf)[0]


def by_safecl(hidden: Tensor, head: Tensor, teacher: Tensor) -> Tensor:
    """Compute it with the fused head."""
    from safecl.kernels import DenseTeacher, linear_distill_loss

    leaf = hidden.clone().requires_grad_()
    out = linear_distill_loss(leaf, head, teacher=DenseTeacher(teacher, head.float()), kd_weights=1 / len(hidden))
    return torch.autograd.grad(out.loss, leaf)[0]
