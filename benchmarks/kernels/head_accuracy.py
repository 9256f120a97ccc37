"""Accuracy of the fused head near its teacher, against fp64.

    python -m benchmarks.kernels.head_accuracy

A bf16 student (64 tokens, H 256, V 8000, logits of standard deviation 6) has a chosen mean KL from its teacher. Rivals
on the same inputs: logits rounded to bf16 before the softmax, as in most fused losses; the plain sum of q (log q -
log p) in fp32; and top-k caches of 16, 64 and 256 tokens instead of the dense teacher. Errors are relative norms. There
is no time and no roof. Writes benchmarks/results/head-accuracy.json.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import ROOT
from benchmarks.harness import machine, write_json
from safecl.kernels import DenseTeacher, linear_distill_loss, linear_topk

TOKENS, WIDTH, VOCAB, STD = 64, 256, 8000, 6.0
LEVELS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def exact(hidden: Tensor, weight: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return (KL per token, gradient of the hidden states) in fp64."""
    leaf = hidden.double().requires_grad_()
    log_p, log_q = ((x @ weight.double().T).log_softmax(-1) for x in (leaf, teacher.double()))
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    (grad,) = torch.autograd.grad(kl.mean(), leaf)
    return kl.detach(), grad


def at_distance(level: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden and weight in bf16, and the teacher's hidden states in fp32, whose mean KL is ``level``."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=g).bfloat16()
    weight = (torch.randn(VOCAB, WIDTH, generator=g) * STD / WIDTH**0.5).bfloat16()
    direction, drift = torch.randn(TOKENS, WIDTH, generator=g), level**0.5
    for _ in range(6):
        teacher = hidden.float() + drift * direction
        drift *= (level / float(exact(hidden, weight, teacher)[0].mean())) ** 0.5
    return hidden, weight, teacher


def fused(hidden: Tensor, weight: Tensor, teacher) -> tuple[Tensor, Tensor]:
    leaf = hidden.clone().requires_grad_()
    output = linear_distill_loss(leaf, weight, teacher=teacher, kd_weights=1 / TOKENS)
    output.loss.backward()
    return output.kd, leaf.grad


def rounded_logits(hidden: Tensor, weight: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL and gradient in the usual way: logits of both models in bf16, the softmax in fp32, the plain sum."""
    leaf = hidden.clone().requires_grad_()
    log_q = (teacher @ weight.float().T).bfloat16().float().log_softmax(-1)
    log_p = F.linear(leaf, weight).float().log_softmax(-1)
    kl = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    kl.mean().backward()
    return kl.detach(), leaf.grad


def plain_sum(hidden: Tensor, weight: Tensor, teacher: Tensor) -> Tensor:
    log_p, log_q = ((x @ weight.float().T).log_softmax(-1) for x in (hidden.float(), teacher))
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def measure(level: float) -> dict[str, float]:
    hidden, weight, teacher = at_distance(level)
    kl, grad = exact(hidden, weight, teacher)
    ours_kl, ours_grad = fused(hidden, weight, DenseTeacher(teacher, weight.float()))
    rounded_kl, rounded_grad = rounded_logits(hidden, weight, teacher)
    row = {
        "kl": level,
        "gradient": relative(ours_grad, grad),
        "gradient, bf16 logits": relative(rounded_grad, grad),
        "loss": abs(float(ours_kl.mean() / kl.mean()) - 1),
        "loss, plain fp32 sum": abs(float(plain_sum(hidden, weight, teacher).mean() / kl.mean()) - 1),
        "loss, bf16 logits": abs(float(rounded_kl.mean() / kl.mean()) - 1),
    }
    for k in (16, 64, 256):
        stored = linear_topk(teacher, weight.float(), k)
        row[f"gradient, top-{k} with tail"] = relative(fused(hidden, weight, stored)[1], grad)
    half = replace(stored, log_probs=stored.log_probs.half(), log_tail=stored.log_tail.half())
    row["gradient, top-256 with tail in fp16"] = relative(fused(hidden, weight, half)[1], grad)
    return row


def main() -> None:
    rows = [measure(level) for level in LEVELS]
    for name in rows[0]:
        print(f"{name:38s}" + "".join(f"{row[name]:12.1e}" for row in rows))
    write_json(
        ROOT / "benchmarks" / "results" / "head-accuracy.json",
        {"machine": machine(torch.device("cpu")), "rows": rows},
    )


if __name__ == "__main__":
    main()
