"""The fused head against the fp64 oracle: every option, shape and label pattern."""

from __future__ import annotations

import pytest
import torch

from safecl.kernels import DenseTeacher, LogitsTeacher, linear_distill_loss
from tests.kernels.closeness import assert_close, assert_zero
from tests.kernels.head_oracle import Case, make_inputs, truth
from tests.kernels.head_suite import BF16, CASES, F64, check, check_equal, check_masked, make_teacher, run

DIVERGENCES = ["forward_kl", "reverse_kl", "jsd", "mse"]


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_match_the_fp64_oracle(name):
    check(CASES[name])


@pytest.mark.parametrize("tokens", [1, 3, 31, 32, 33, 69, 127])
@pytest.mark.parametrize(
    "case", [Case(), Case(teacher="topk", divergence="jsd"), Case(teacher=None)], ids=["dense", "top-k", "ce"]
)
def test_any_number_of_tokens_around_the_chunk_of_32(tokens, case):
    check(case.but(tokens=tokens, tile_rows=32 if case.teacher == "dense" else 16, labels="all"))


@pytest.mark.parametrize("vocab", [7, 1000, 32000, 32003, 128256, 151936])
@pytest.mark.parametrize("teacher", ["dense", "topk"])
def test_any_width_of_the_vocabulary(vocab, teacher):
    check(Case(tokens=3, width=12, vocab=vocab, k=5, teacher=teacher, labels="all", teacher_rows="all"))


def test_a_hidden_width_that_is_no_multiple_of_eight():
    check(Case(width=13, dtype=BF16))


def test_the_budget_changes_the_chunks_and_not_the_numbers():
    case = Case(tokens=50, labels="all", teacher_rows="all", dtype=F64)
    inputs = make_inputs(case)
    teacher = make_teacher(case, inputs)
    _, whole = run(case, inputs, teacher)
    for rows in (1, 7, 49):
        _, parts = run(case, inputs, teacher, tile_bytes=rows * case.vocab * 16)
        assert_close(parts["weight"], whole["weight"], 1e-12)
        assert_close(parts["hidden"], whole["hidden"], 1e-12)


@pytest.mark.parametrize(
    "case", [Case(teacher=None, labels="ignored"), Case(teacher=None, labels="none")], ids=["ignored", "no labels"]
)
def test_no_supervised_token_is_an_exact_zero_with_a_graph(case):
    inputs = make_inputs(case)
    output, grads = run(case, inputs, None)
    assert output.loss.item() == 0 and output.loss.requires_grad
    for grad in grads.values():
        assert_zero(grad)


def test_no_token_at_all_is_an_exact_zero_with_a_graph():
    hidden, weight = torch.zeros(0, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    for teacher in (None, DenseTeacher(torch.zeros(0, 8), weight.detach())):
        output = linear_distill_loss(hidden, weight, labels=torch.zeros(0, dtype=torch.int64), teacher=teacher)
        output.loss.backward()
        assert output.loss.item() == 0 and output.ce.shape == (0,)
        assert_zero(weight.grad)


def test_nan_and_infinity_in_rows_that_do_not_count_never_leak():
    case = Case()
    inputs = make_inputs(case)
    teacher = make_teacher(case, inputs)
    want, want_grads = run(case, inputs, teacher)
    idle = inputs.labels == -100
    idle[inputs.teacher_rows] = False
    assert idle.any()
    inputs.hidden[idle] = float("nan")
    inputs.hidden[idle.nonzero()[0]] = float("inf")
    output, grads = run(case, inputs, teacher)
    assert torch.equal(output.loss, want.loss)
    assert_close(grads["weight"], want_grads["weight"], 1e-6)
    assert_zero(grads["hidden"][idle])


def test_any_token_can_be_the_ignored_one():
    case = Case(labels="all")
    inputs = make_inputs(case)
    inputs.labels[2::5] = -100
    want, want_grads = run(case, inputs, make_teacher(case, inputs))
    inputs.labels[2::5] = 17
    output, grads = run(case, inputs, make_teacher(case, inputs), ignore_index=17)
    assert torch.equal(output.loss, want.loss)
    assert_close(grads["weight"], want_grads["weight"], 1e-6)


def test_a_weight_of_zero_silences_a_row_and_its_teacher():
    case = Case(labels="all", teacher_rows="all")
    inputs = make_inputs(case)
    inputs.ce_weights[3] = inputs.kd_weights[3] = inputs.kd_weights[5] = 0
    want = truth(case, inputs)
    inputs.hidden[3] = inputs.teacher_hidden[3] = inputs.teacher_hidden[5] = float("nan")
    output, grads = run(case, inputs, make_teacher(case, inputs))
    assert_close(output.loss[None], want.loss[None], 1e-5)
    assert_close(grads["weight"], want.grads["weight"], 1e-5)
    assert output.ce[3] == output.kd[3] == output.kd[5] == 0


def test_a_number_as_weight_means_the_same_for_every_token():
    case = Case(labels="all", teacher_rows="all")
    inputs = make_inputs(case)
    inputs.ce_weights.fill_(0.25)
    inputs.kd_weights.fill_(-2.0)
    teacher = make_teacher(case, inputs)
    want, _ = run(case, inputs, teacher)
    got, _ = run(case, inputs, teacher, ce_weights=0.25, kd_weights=torch.tensor(-2.0))
    assert torch.equal(got.loss, want.loss)


def test_the_order_of_teacher_rows_is_free():
    case = Case()
    inputs = make_inputs(case)
    want, _ = run(case, inputs, make_teacher(case, inputs))
    order = torch.randperm(inputs.teacher_rows.shape[0])
    inputs.teacher_rows, inputs.teacher_hidden = inputs.teacher_rows[order], inputs.teacher_hidden[order]
    got, _ = run(case, inputs, make_teacher(case, inputs))
    assert_close(got.kd, want.kd, 1e-6)


def test_leading_dimensions_come_back_in_the_losses():
    hidden, weight, labels = torch.randn(2, 5, 8), torch.randn(30, 8), torch.randint(0, 30, (2, 5))
    flat = linear_distill_loss(hidden.view(10, 8), weight, labels=labels.view(10))
    output = linear_distill_loss(hidden, weight, labels=labels)
    assert output.ce.shape == output.kd.shape == output.logsumexp.shape == (2, 5)
    assert torch.equal(output.ce.view(10), flat.ce)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
def test_a_student_equal_to_its_teacher_has_loss_and_gradient_exactly_zero(divergence, dtype):
    check_equal(divergence, dtype)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_token_masked_in_student_and_teacher_is_as_if_it_were_not_there(divergence):
    check_masked(divergence)


def _logits_case(student: list, teacher: list, **options):
    """dloss/dlogits of one row, through an identity head."""
    logits = torch.tensor([student]).requires_grad_()
    identity = torch.eye(len(student))
    output = linear_distill_loss(logits, identity, teacher=LogitsTeacher(torch.tensor([teacher])), **options)
    output.loss.backward()
    return output, logits.grad[0]


def test_a_teacher_that_excludes_a_token_pushes_it_down():
    output, grad = _logits_case([1.0, 2.0, 3.0], [1.0, -torch.inf, 3.0])
    p, q = torch.tensor([1.0, 2.0, 3.0]).softmax(0), torch.tensor([1.0, -torch.inf, 3.0]).softmax(0)
    assert_close(grad, p - q, 1e-6)
    assert_close(output.kd[0][None], (q[[0, 2]] * (q[[0, 2]] / p[[0, 2]]).log()).sum()[None], 1e-6)
    _, reverse = _logits_case([1.0, 2.0, 3.0], [1.0, -torch.inf, 3.0], divergence="reverse_kl")
    assert torch.isfinite(reverse).all() and reverse[1] > 0


def test_a_student_without_mass_where_the_teacher_has_it_is_infinitely_far_with_a_finite_gradient():
    bias = torch.tensor([0.0, -torch.inf, 0.0])
    logits = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    output = linear_distill_loss(
        logits, torch.eye(3), bias=bias, teacher=LogitsTeacher(torch.tensor([[1.0, 2.0, 3.0]]))
    )
    output.loss.backward()
    p, q = (logits.detach()[0] + bias).softmax(0), logits.detach()[0].softmax(0)
    assert output.kd[0] == torch.inf
    assert_close(logits.grad[0], p - q, 1e-6)


def test_a_one_hot_teacher_is_cross_entropy():
    case = Case(labels="all", teacher_rows="all")
    inputs = make_inputs(case)
    hard, hard_grads = run(case, inputs, None, teacher_rows=None, ce_weights=inputs.kd_weights)
    one_hot = torch.full((case.tokens, case.vocab), -torch.inf).scatter(1, inputs.labels[:, None], 0.0)
    soft, soft_grads = run(case, inputs, LogitsTeacher(one_hot), labels=None)
    assert_close(soft.kd, hard.ce, 1e-5)
    assert_close(soft_grads["weight"], hard_grads["weight"], 1e-5)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_logits_of_eighty_overflow_nothing(divergence):
    check(Case(divergence=divergence, std=40.0, drift=1.0, labels="all", tokens=40))


def test_a_masked_label_is_infinitely_unlikely_with_a_finite_gradient():
    bias = torch.tensor([0.0, -torch.inf, 0.0])
    logits = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    output = linear_distill_loss(logits, torch.eye(3), bias=bias, labels=torch.tensor([1]))
    output.loss.backward()
    assert output.ce[0] == torch.inf and torch.isfinite(logits.grad).all()
    assert logits.grad[0, 1] == -1


def test_the_helper_refuses_a_bound_that_zeros_would_pass():
    ones = torch.ones(4)
    with pytest.raises(AssertionError, match="zeros have an error of 1"):
        assert_close(torch.zeros(4), ones, 1.0)
    with pytest.raises(AssertionError, match="every expected value is 0"):
        assert_close(torch.zeros(4), torch.zeros(4), 1e-3)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(torch.zeros(4), 1e-9 * ones, 0.1)


def test_the_oracles_own_gradient_is_the_difference_quotient():
    for case in (CASES["JSD"], CASES["top-k tail, JSD"], CASES["bias, scale and softcap"]):
        case = case.but(tokens=2, vocab=11, k=3, dtype=F64, teacher_rows="all", labels="all")
        inputs = make_inputs(case)
        teacher = make_teacher(case, inputs)
        stored = (teacher.log_probs, teacher.indices, teacher.log_tail) if case.teacher == "topk" else None
        direction = torch.randn_like(inputs.hidden)
        slope = (truth(case, inputs, stored).grads["hidden"] * direction).sum()
        hidden, step, values = inputs.hidden, 1e-5, []
        for sign in (1, -1):
            inputs.hidden = hidden + sign * step * direction
            values.append(truth(case, inputs, stored).loss)
        assert_close(((values[0] - values[1]) / (2 * step))[None], slope[None], 1e-6)
