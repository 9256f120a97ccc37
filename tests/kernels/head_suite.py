"""The checks that every back end of the head must pass, as plain functions.

Tests run them, and each break on the mutation list must make one of them fail.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from safecl.kernels import (
    DenseTeacher,
    LinearDistillOutput,
    LogitsTeacher,
    TopKTeacher,
    distill_loss,
    linear_distill_loss,
    linear_topk,
)
from tests.kernels.closeness import assert_close, assert_zero
from tests.kernels.head_oracle import Case, Inputs, dense_kd, make_inputs, teacher_logits, truth

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
BOUNDS = {F64: 1e-10, F32: 5e-5, BF16: 5e-3}  # of gradients; bf16: the rounding of the returned gradient itself

CASES = {
    "cross-entropy": Case(teacher=None),
    "forward KL and CE": Case(),
    "reverse KL": Case(divergence="reverse_kl", labels="none", teacher_rows="all"),
    "JSD": Case(divergence="jsd", temperature=1.5),
    "dense MSE": Case(divergence="mse", temperature=2.0, temperature_scale="square"),
    "bf16": Case(dtype=BF16, temperature=2.0, temperature_scale="square"),
    "fp64": Case(dtype=F64, softcap=8.0),
    "bias, scale and softcap": Case(bias=True, logit_scale=0.6, softcap=10.0, z_loss=1e-2),
    "z-loss": Case(teacher=None, z_loss=0.05),
    "all rows taught, all labelled": Case(labels="all", teacher_rows="all"),
    "narrower teacher": Case(teacher_width=10),
    "teacher with a padded vocabulary": Case(teacher_vocab=1024, temperature=2.0),
    "student with a padded vocabulary": Case(teacher_vocab=990, divergence="jsd"),
    "cached logits": Case(teacher="logits", divergence="reverse_kl", temperature=0.7),
    "top-k tail": Case(teacher="topk", temperature=2.0, temperature_scale="square"),
    "top-k tail, reverse KL": Case(teacher="topk", divergence="reverse_kl", labels="none"),
    "top-k tail, JSD": Case(teacher="topk", divergence="jsd", bias=True, softcap=12.0),
    "top-k truncated": Case(teacher="topk", mode="truncated", drift=0.5),
    "top-k truncated, reverse KL": Case(teacher="topk", mode="truncated", divergence="reverse_kl", drift=0.5),
    "top-k truncated, JSD": Case(teacher="topk", mode="truncated", divergence="jsd", drift=0.5),
    "top-k renormalised": Case(teacher="topk", mode="renormalised", labels="all"),
    "top-k renormalised, gathered": Case(
        teacher="topk", mode="renormalised", k=5, labels="none", divergence="jsd", bias=True
    ),
    "top-k uniform tail": Case(teacher="topk", mode="uniform_tail", temperature=2.0),
    "top-k uniform tail, reverse KL": Case(teacher="topk", mode="uniform_tail", divergence="reverse_kl"),
    "DER through the full product": Case(teacher="topk", divergence="mse", labels="all", k=5),
    "DER through gathered rows": Case(
        teacher="topk", divergence="mse", labels="some", teacher_rows="all", k=5, bias=True, softcap=9.0
    ),
    "k = 1": Case(teacher="topk", k=1, temperature=1.5),
}


def make_teacher(case: Case, inputs: Inputs):
    """The teacher of a case as the public type, and what a top-k teacher stores."""
    shape = {"softcap": case.softcap, "logit_scale": case.logit_scale}
    if case.teacher is None:
        return None
    if case.teacher == "dense":
        return DenseTeacher(inputs.teacher_hidden, inputs.teacher_weight, inputs.teacher_bias, **shape)
    if case.teacher == "logits":
        return LogitsTeacher(teacher_logits(case, inputs).float())  # on the device of the inputs
    head = (inputs.teacher_hidden, inputs.teacher_weight, case.k)
    return replace(linear_topk(*head, bias=inputs.teacher_bias, temperature=case.temperature, **shape), mode=case.mode)


def run(case: Case, inputs: Inputs, teacher, **changes) -> tuple[LinearDistillOutput, dict[str, torch.Tensor]]:
    """(output, gradients by name) of the public function."""
    names = [name for name in ("hidden", "weight", "bias") if getattr(inputs, name) is not None]
    leaves = {name: getattr(inputs, name).detach().clone().requires_grad_() for name in names}
    tile_bytes = 2**30 if case.tile_rows is None else case.tile_rows * case.vocab * 8
    arguments = {
        "labels": inputs.labels,
        "ce_weights": inputs.ce_weights,
        "teacher": teacher,
        "teacher_rows": inputs.teacher_rows,
        "kd_weights": inputs.kd_weights,
        "divergence": case.divergence,
        "beta": case.beta,
        "temperature": case.temperature,
        "temperature_scale": case.temperature_scale,
        "softcap": case.softcap,
        "logit_scale": case.logit_scale,
        "z_loss": case.z_loss,
        "tile_bytes": tile_bytes,
        **changes,
    }
    output = linear_distill_loss(leaves["hidden"], leaves["weight"], bias=leaves.get("bias"), **arguments)
    output.loss.backward()
    return output, {name: leaf.grad for name, leaf in leaves.items()}


def check(case: Case, bound: float | None = None, device: str = "cpu") -> None:
    """Loss, per-token losses, logsumexp and every gradient against the oracle."""
    inputs = make_inputs(case)
    on_device = inputs.to(device)
    teacher = make_teacher(case, on_device)
    stored = teacher.to("cpu") if isinstance(teacher, TopKTeacher) else None
    want = truth(case, inputs, stored and (stored.log_probs, stored.indices, stored.log_tail))
    output, grads = run(case, on_device, teacher)
    bound = bound or BOUNDS[case.dtype]
    _compare(output.loss[None], want.loss[None], min(bound, 1e-4), "loss")
    _compare(output.ce, want.ce, 1e-5, "ce")
    _compare(output.kd, want.kd, 1e-4, "kd")
    _compare(output.logsumexp, want.logsumexp, 1e-5, "logsumexp")
    for name, grad in grads.items():
        assert grad.dtype == getattr(inputs, name).dtype
        _compare(grad, want.grads[name], bound, f"gradient of {name}")


def _compare(actual, expected, bound: float, what: str) -> None:
    if expected.norm() == 0:
        assert_zero(actual, what)
    else:
        assert_close(actual, expected, bound, what)


def check_equal(divergence: str, dtype: torch.dtype = F32, tokens: int = 13) -> None:
    """p == q: loss and gradients are zero to the last bit."""
    case = Case(
        tokens,
        divergence=divergence,
        dtype=dtype,
        drift=0.0,
        labels="none",
        teacher_rows="all",
        temperature=2.0,
        softcap=9.0,
        bias=True,
    )
    inputs = make_inputs(case)
    output, grads = run(case, inputs, make_teacher(case, inputs))
    assert_zero(output.kd, "kd")
    for name, grad in grads.items():
        assert_zero(grad, f"gradient of {name}")


def check_masked(divergence: str, tokens: int = 13) -> None:
    """A token whose logit is -inf in student and teacher changes nothing."""
    case = Case(tokens, divergence=divergence, bias=True, labels="none", softcap=11.0)
    inputs = make_inputs(case)
    kept = torch.ones(case.vocab, dtype=torch.bool)
    kept[100:200] = False
    inputs.bias[~kept] = -torch.inf
    output, grads = run(case, inputs, make_teacher(case, inputs))
    inputs.weight, inputs.bias = inputs.weight[kept], inputs.bias[kept]
    inputs.teacher_weight, inputs.teacher_bias = inputs.teacher_weight[kept], inputs.teacher_bias[kept]
    want = truth(case.but(vocab=int(kept.sum())), inputs)
    assert_close(output.kd, want.kd, 1e-4, "kd")
    assert_close(grads["weight"][kept], want.grads["weight"], 1e-4, "gradient of weight")
    assert_zero(grads["weight"][~kept], "gradient of the masked tokens")


def check_whole_vocabulary(divergence: str, mode: str, tokens: int = 13) -> None:
    """A top-k teacher with k = V is the dense one."""
    case = Case(tokens, vocab=60, k=60, divergence=divergence, temperature=1.5, labels="some", drift=0.5)
    inputs = make_inputs(case)
    want, want_grads = run(case, inputs, make_teacher(case, inputs))
    teacher = make_teacher(case.but(teacher="topk", mode=mode), inputs)
    assert (teacher.log_tail == -torch.inf).all()
    output, grads = run(case, inputs, teacher)
    assert_close(output.kd, want.kd, 1e-4, "kd")
    for name in ("weight", "hidden"):
        assert_close(grads[name], want_grads[name], 1e-5, f"gradient of {name}")


def check_not_negative(divergence: str = "forward_kl", drift: float = 1e-6, tokens: int = 4) -> None:
    """Below the resolution of fp32 the loss is small and not negative."""
    case = Case(tokens, vocab=5000, divergence=divergence, drift=drift, labels="none", teacher_rows="all")
    inputs = make_inputs(case)
    output, _ = run(case, inputs, make_teacher(case, inputs))
    assert (output.kd >= 0).all() and (output.kd < 1e-8).all(), output.kd


def check_scaled(factor: float = 0.3) -> None:
    """The upstream gradient scales every gradient."""
    case = Case(tokens=4)
    inputs = make_inputs(case)
    want = truth(case, inputs).grads["weight"]
    weight = inputs.weight.clone().requires_grad_()
    options = {
        "teacher": make_teacher(case, inputs),
        "teacher_rows": inputs.teacher_rows,
        "kd_weights": inputs.kd_weights,
    }
    (
        factor
        * linear_distill_loss(inputs.hidden, weight, labels=inputs.labels, ce_weights=inputs.ce_weights, **options).loss
    ).backward()
    assert_close(weight.grad, factor * want, 5e-5)


def check_near(tokens: int = 6) -> None:
    """A student 1e-4 from its teacher: loss and gradient keep their digits."""
    case = Case(tokens, drift=3e-4, labels="none", teacher_rows="all", std=2.0)
    inputs = make_inputs(case)
    want = truth(case, inputs)
    output, grads = run(case, inputs, make_teacher(case, inputs))
    assert 1e-8 < want.kd.mean() < 1e-5
    assert_close(output.kd, want.kd, 2e-2, "kd")
    assert_close(grads["hidden"], want.grads["hidden"], 2e-2, "gradient of hidden")


def check_given_logits() -> None:
    """distill_loss on logits without the head."""
    case = Case(divergence="jsd", temperature=1.5)
    g = torch.Generator().manual_seed(0)
    student = (3 * torch.randn(3, 700, generator=g)).requires_grad_()
    teacher = student.detach() + torch.randn(3, 700, generator=g)
    exact = student.detach().double().requires_grad_()
    want = dense_kd(exact, teacher.double(), case)
    want.mean().backward()
    loss = distill_loss(student, teacher, divergence="jsd", beta=case.beta, temperature=1.5)
    loss.backward()
    assert_close(loss[None], want.mean()[None], 1e-5, "loss")
    assert_close(student.grad, exact.grad, 1e-5, "gradient")
