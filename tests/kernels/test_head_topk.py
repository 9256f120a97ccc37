"""Top-k teachers: the closed-form gradients, the tail, the gathered product, and linear_topk itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from safecl.kernels import DenseTeacher, TopKTeacher, linear_distill_loss, linear_topk
from safecl.kernels.head import calls, chunks, topk
from tests.kernels.closeness import assert_close, assert_zero
from tests.kernels.head_oracle import Case, make_inputs, teacher_logits
from tests.kernels.head_suite import BF16, CASES, check_whole_vocabulary, make_teacher, run


def _setting(vocab=300, k=10, temperature=1.0, std=4.0):
    g = torch.Generator().manual_seed(3)
    student, teacher = (std * torch.randn(4, vocab, generator=g) for _ in range(2))
    return student, linear_topk(teacher, torch.eye(vocab), k, temperature=temperature)


def _logit_gradient(student, teacher, **options):
    student = student.clone().requires_grad_()
    output = linear_distill_loss(
        student, torch.eye(student.shape[1]), teacher=teacher, temperature=teacher.temperature, **options
    )
    output.loss.backward()
    return student.grad


def test_with_a_tail_bucket_the_gradient_is_p_minus_q_and_p_times_one_minus_the_ratio_of_tails():
    student, teacher = _setting(temperature=2.0)
    p = (student.double() / 2).softmax(-1)
    stored = torch.zeros_like(p, dtype=torch.bool).scatter(1, teacher.indices, True)
    p_tail = (p * ~stored).sum(1, keepdim=True)
    want = p * (1 - teacher.log_tail.double().exp()[:, None] / p_tail)
    want = want.scatter(1, teacher.indices, p.gather(1, teacher.indices) - teacher.log_probs.double().exp()) / 2
    assert_close(_logit_gradient(student, teacher), want, 1e-5)


def test_truncated_the_gradient_is_q_total_p_minus_q():
    student, teacher = _setting()
    p, q = student.double().softmax(-1), teacher.log_probs.double().exp()
    want = q.sum(1, keepdim=True) * p
    want = want.scatter_add(1, teacher.indices, -q)
    assert_close(_logit_gradient(student, replace(teacher, mode="truncated")), want, 1e-5)


def test_renormalised_the_gradient_stays_on_the_stored_tokens():
    student, teacher = _setting()
    p = student.double().gather(1, teacher.indices).softmax(-1)
    want = torch.zeros(student.shape, dtype=torch.float64).scatter(
        1, teacher.indices, p - teacher.log_probs.double().softmax(-1)
    )
    assert_close(_logit_gradient(student, replace(teacher, mode="renormalised")), want, 1e-5)


def test_a_uniform_tail_gives_p_minus_an_even_share_of_the_tail():
    student, teacher = _setting()
    q = (
        (teacher.log_tail.double().exp() / 290)[:, None]
        .expand(4, 300)
        .scatter(1, teacher.indices, teacher.log_probs.double().exp())
    )
    assert_close(
        _logit_gradient(student, replace(teacher, mode="uniform_tail")), student.double().softmax(-1) - q, 1e-5
    )


@pytest.mark.parametrize("mode", ["tail", "truncated", "renormalised", "uniform_tail"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "mse"])
def test_storing_the_whole_vocabulary_equals_the_dense_teacher(divergence, mode):
    check_whole_vocabulary(divergence, mode)


def test_a_tail_of_1e_14_has_its_digits():
    vocab, k = 32000, 64
    logits = torch.full((3, vocab), -40.0)
    logits[:, :k] = torch.randn(3, k)
    logits += 0.1 * torch.randn(3, vocab)
    _, indices, log_tail = topk.topk_with_tail_(
        logits.clone(), k
    )  # the row work alone: an identity head of this width is 4 GB
    exact = logits.double()
    want = torch.logsumexp(exact.scatter(1, indices, -torch.inf), 1) - torch.logsumexp(exact, 1)
    assert (want < -28).all()
    assert_close(log_tail.exp(), want.exp(), 2e-5)


def test_the_students_tail_is_right_where_one_minus_the_sum_is_noise():
    vocab, k = 4000, 8
    g = torch.Generator().manual_seed(0)
    student = torch.randn(5, vocab, generator=g)
    student[:, :k] += 30.0
    teacher = linear_topk(student + 0.3 * torch.randn(5, vocab, generator=g), torch.eye(vocab), k)
    p = student.double().softmax(-1)
    tail = p[:, k:].sum(1, keepdim=True)
    assert (tail < 1e-9).all()
    want = p * (1 - teacher.log_tail.double().exp()[:, None] / tail)
    off = torch.ones(vocab, dtype=torch.bool)
    off[:k] = False
    assert_close(_logit_gradient(student, teacher)[:, off], want[:, off], 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("k", [1, 64, 1000])
def test_linear_topk_is_exact(k, dtype):
    case = Case(
        tokens=70,
        dtype=dtype,
        bias=True,
        softcap=9.0,
        logit_scale=0.8,
        temperature=1.7,
        k=k,
        teacher="topk",
        teacher_rows="all",
    )
    inputs = make_inputs(case)
    teacher = make_teacher(case, inputs)
    log_q = (teacher_logits(case, inputs) / case.temperature).log_softmax(-1)
    want, indices = log_q.topk(k, dim=-1)
    assert_close(teacher.log_probs, want, 1e-6)
    assert_close(teacher.log_probs, log_q.gather(1, teacher.indices), 1e-6)
    if k < 1000:
        assert (teacher.indices == indices).float().mean() > 0.999  # equal logits may swap places
        assert_close(teacher.log_tail.exp(), log_q.scatter(1, indices, -torch.inf).exp().sum(1), 1e-5)
    assert (teacher.temperature, teacher.vocab_size, teacher.mode) == (1.7, 1000, "tail")


class _LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_no_tensor_of_tokens_by_vocabulary_ever_exists(monkeypatch):
    monkeypatch.setattr(
        calls, "_linear_distill", calls._linear_distill._init_fn
    )  # operators inside an operator are invisible to the mode
    hidden, weight = torch.randn(1200, 4), torch.randn(3000, 4)
    with _LargestTensor() as seen:
        teacher = linear_topk(hidden, weight, 5)
        linear_distill_loss(hidden, weight, labels=torch.zeros(1200, dtype=torch.int64), teacher=teacher)
        linear_distill_loss(hidden, weight, teacher=DenseTeacher(hidden, weight), tile_bytes=100 * 3000 * 8)
    assert 0 < seen.numel <= 1200 * 3000 / 2


def test_gathered_rows_give_what_the_full_product_gives_without_running_it(monkeypatch):
    case = CASES["DER through gathered rows"].but(labels="none")
    inputs = make_inputs(case)
    teacher = make_teacher(case, inputs)
    monkeypatch.setattr(chunks, "can_gather", lambda *_: False)
    want, want_grads = run(case, inputs, teacher)
    monkeypatch.undo()
    monkeypatch.setattr(chunks, "project", None)  # the full product
    output, grads = run(case, inputs, teacher)
    assert_close(output.kd, want.kd, 1e-5)
    for name, grad in grads.items():
        assert_close(grad, want_grads[name], 1e-5, name)


def test_der_ignores_a_constant_that_only_moves_the_normaliser():
    case = CASES["DER through gathered rows"]
    inputs = make_inputs(case)
    teacher = make_teacher(case, inputs)
    want, _ = run(case, inputs, teacher)
    shifted, _ = run(case, inputs, replace(teacher, log_probs=teacher.log_probs + 3.0))
    assert_close(shifted.kd, want.kd, 1e-5)


def test_a_sixteen_bit_cache_is_accepted_and_close():
    case = CASES["top-k tail"].but(drift=0.3)
    inputs = make_inputs(case)
    teacher = make_teacher(case, inputs)
    want, _ = run(case, inputs, teacher)
    half = replace(
        teacher, log_probs=teacher.log_probs.half(), log_tail=teacher.log_tail.half(), indices=teacher.indices.int()
    )
    output, _ = run(case, inputs, half)
    assert (output.kd >= 0).all()
    assert_close(output.kd, want.kd, 3e-2)


def test_rows_of_a_teacher_can_be_selected_and_moved():
    _, teacher = _setting()
    part = teacher[torch.tensor([2, 0])].to("cpu")
    assert torch.equal(part.indices, teacher.indices[[2, 0]]) and part.num_rows == 2 and part.vocab_size == 300


def test_no_row_of_a_top_k_teacher_is_no_loss():
    teacher = TopKTeacher(torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0), 1.0, 50)
    weight = torch.randn(50, 8, requires_grad=True)
    output = linear_distill_loss(
        torch.randn(3, 8), weight, teacher=teacher, teacher_rows=torch.zeros(0, dtype=torch.int64)
    )
    output.loss.backward()
    assert output.loss == 0
    assert_zero(weight.grad)
