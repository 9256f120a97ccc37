"""Distillation on given logits against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch

from safecl.kernels import distill_loss
from tests.kernels.closeness import assert_close, assert_zero
from tests.kernels.head_oracle import Case, dense_kd

DIVERGENCES = ["forward_kl", "reverse_kl", "jsd", "mse"]


def _logits(dtype=torch.float32, shape=(2, 7, 500), drift=0.3):
    g = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(*shape, generator=g)
    return student.to(dtype), (student + drift * torch.randn(*shape, generator=g)).to(dtype)


def _oracle(student, teacher, case):
    z = student.detach().double().requires_grad_()
    per_token = dense_kd(z.view(-1, z.shape[-1]), teacher.double().view(-1, teacher.shape[-1]), case).view(z.shape[:-1])
    return z, per_token * (case.temperature**2 if case.temperature_scale == "square" else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_reduction_matches_the_oracle(divergence, dtype):
    case = Case(divergence=divergence, temperature=1.5, temperature_scale="square")
    student, teacher = _logits(dtype)
    weights = torch.rand(2, 7)
    options = {"divergence": divergence, "beta": 0.3, "temperature": 1.5, "temperature_scale": "square"}
    reduced = {
        "mean": lambda loss: (weights * loss).sum() / weights.sum(),
        "sum": lambda loss: (weights * loss).sum(),
        "none": lambda loss: (weights * loss * torch.arange(14.0).view(2, 7)).sum(),
    }
    for reduction, reduce in reduced.items():
        z, per_token = _oracle(student, teacher, case)
        reduce(per_token).backward()
        leaf = student.clone().requires_grad_()
        loss = distill_loss(leaf, teacher, weights=weights, reduction=reduction, **options)
        if reduction == "none":
            assert_close(loss, weights * per_token, 1e-4)
            loss = (loss * torch.arange(14.0).view(2, 7)).sum()  # a different upstream gradient for every token
        loss.backward()
        assert_close(loss[None], reduce(per_token)[None], 1e-4)
        assert leaf.grad.dtype == dtype
        assert_close(leaf.grad, z.grad, 1e-4 if dtype == torch.float32 else 8e-3)  # bf16 rounds by up to 3.9e-3, twice


def test_the_plain_mean_is_over_tokens():
    student, teacher = _logits()
    _, per_token = _oracle(student, teacher, Case())
    assert_close(distill_loss(student, teacher)[None], per_token.mean()[None], 1e-5)


def test_bf16_logits_near_the_teacher_lose_no_more_than_their_own_rounding():
    student, teacher = _logits(torch.bfloat16, drift=0.02)
    z, per_token = _oracle(student, teacher, Case())
    per_token.sum().backward()
    leaf = student.clone().requires_grad_()
    distill_loss(leaf, teacher, reduction="sum").backward()
    assert_close(leaf.grad, z.grad, 5e-3)


def test_rows_of_weight_zero_are_never_read():
    student, teacher = _logits()
    weights = torch.ones(2, 7)
    weights[0, 3] = weights[1, 1] = 0
    want = distill_loss(student, teacher, weights=weights)
    student[0, 3], teacher[1, 1] = float("nan"), float("inf")
    student.requires_grad_()
    loss = distill_loss(student, teacher, weights=weights)
    loss.backward()
    assert torch.equal(loss, want)
    assert_zero(student.grad[0, 3])
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("shape", [(0, 9), (3, 9)])
def test_no_weighted_token_is_an_exact_zero(shape):
    student = torch.randn(*shape, requires_grad=True)
    loss = distill_loss(student, torch.randn(*shape), weights=torch.zeros(shape[:-1]))
    loss.backward()
    assert loss.item() == 0
    assert_zero(student.grad)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_logits_themselves_stay_as_they_are(divergence):
    student, teacher = _logits()
    before = student.clone(), teacher.clone()
    distill_loss(student.requires_grad_(), teacher, divergence=divergence, temperature=2.0).backward()
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


def test_strides_do_not_matter():
    student, teacher = _logits()
    swapped = student.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    distill_loss(swapped, teacher).backward()
    distill_loss(student.requires_grad_(), teacher).backward()
    assert_close(swapped.grad, student.grad, 1e-6)


def test_the_teacher_receives_no_gradient():
    student, teacher = (logits.requires_grad_() for logits in _logits())
    distill_loss(student, teacher).backward()
    assert teacher.grad is None


def test_a_padded_teacher_is_compared_over_the_shared_tokens():
    student, teacher = _logits()
    wide = torch.cat([teacher, torch.full((2, 7, 24), 50.0)], -1)
    assert torch.equal(distill_loss(student, wide), distill_loss(student, teacher))
