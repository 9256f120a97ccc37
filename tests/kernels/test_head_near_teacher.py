"""Accuracy for a student that is very near its teacher, the normal case of continual learning."""

from __future__ import annotations

import pytest
import torch

from safecl.kernels import DenseTeacher, linear_topk
from tests.kernels.closeness import assert_close
from tests.kernels.head_oracle import Case, Inputs, make_inputs, truth
from tests.kernels.head_suite import BF16, check_not_negative, run

DIVERGENCES = ["forward_kl", "reverse_kl", "jsd"]
GRADIENT_BOUNDS = {1e-1: 1e-2, 1e-2: 1e-2, 1e-3: 1e-2, 1e-4: 2e-2, 1e-5: 2e-2, 1e-6: 5e-2}


def at_distance(kl: float, divergence: str, dtype: torch.dtype, std: float) -> tuple[Case, Inputs]:
    """A case whose mean divergence is ``kl``: the teacher's fp32 hidden states are moved until it is."""
    case = Case(
        tokens=24, width=64, vocab=2000, divergence=divergence, dtype=dtype, std=std, labels="none", teacher_rows="all"
    )
    inputs = make_inputs(case)
    inputs.kd_weights.fill_(1 / case.tokens)
    direction, start = (
        torch.randn(inputs.hidden.shape, generator=torch.Generator().manual_seed(1)),
        inputs.hidden.float(),
    )
    inputs.teacher_weight = inputs.weight.float()
    drift = kl**0.5
    for _ in range(6):
        inputs.teacher_hidden = start + drift * direction
        drift *= (kl / float(truth(case, inputs).kd.mean())) ** 0.5
    return case, inputs


@pytest.mark.parametrize("std", [2.0, 8.0], ids=["flat", "peaky"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kl", GRADIENT_BOUNDS)
def test_gradient_and_loss_hold_down_to_a_kl_of_1e_6(kl, divergence, dtype, std):
    case, inputs = at_distance(kl, divergence, dtype, std)
    want = truth(case, inputs)
    assert_close(want.kd.mean()[None], torch.tensor([kl]), 0.05, "the case's own distance")
    output, grads = run(case, inputs, DenseTeacher(inputs.teacher_hidden, inputs.teacher_weight))
    assert_close(output.loss[None], want.loss[None], 1e-3, "loss")
    assert_close(
        output.kd, want.kd, 1e-3 if kl > 1e-6 else 3e-3, "loss per token"
    )  # logits of 30 have an ulp of 2e-6, a log-ratio is 1e-3
    assert (output.kd >= 0).all()
    for name, grad in grads.items():
        assert_close(grad, want.grads[name], GRADIENT_BOUNDS[kl], name)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("drift", [1e-5, 1e-6, 1e-7, 1e-8])
def test_a_divergence_below_fp32_resolution_is_never_negative(divergence, drift):
    check_not_negative(divergence, drift, tokens=32)


@pytest.mark.parametrize("kl", [1e-3, 1e-5])
def test_a_full_precision_top_k_cache_holds_near_the_teacher_too(kl):
    case, inputs = at_distance(kl, "forward_kl", torch.float32, 8.0)
    teacher = linear_topk(inputs.teacher_hidden, inputs.teacher_weight, 64)
    want = truth(case, inputs, (teacher.log_probs, teacher.indices, teacher.log_tail))
    output, grads = run(case, inputs, teacher)
    assert (output.kd >= 0).all()
    assert_close(output.kd, want.kd, 1e-2)
    assert_close(grads["hidden"], want.grads["hidden"], 1e-2)


def test_the_tail_of_64_stored_tokens_costs_half_a_percent_of_the_dense_gradient():
    case, inputs = at_distance(1e-3, "forward_kl", torch.float32, 8.0)
    dense = truth(case, inputs).grads["hidden"]
    _, grads = run(case, inputs, linear_topk(inputs.teacher_hidden, inputs.teacher_weight, 256))
    assert_close(grads["hidden"], dense, 5e-2)
