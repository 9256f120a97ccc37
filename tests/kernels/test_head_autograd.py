"""The head as a citizen of autograd: scaling, second backwards, frozen parts, no_grad, autocast, compile, odd strides,
fp16."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from safecl.kernels import DenseTeacher, distill_loss, linear_distill_loss, linear_topk
from safecl.kernels.head import calls, segments
from tests.kernels.closeness import assert_close, assert_zero
from tests.kernels.head_oracle import Case, make_inputs, truth
from tests.kernels.head_suite import BF16, F64, make_teacher, run


@pytest.fixture
def setting():
    case = Case(bias=True)
    inputs = make_inputs(case)
    return inputs, make_teacher(case, inputs), truth(case, inputs)


def _loss(inputs, teacher, **changes):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (inputs.hidden, inputs.weight, inputs.bias)]
    arguments = {
        "labels": inputs.labels,
        "ce_weights": inputs.ce_weights,
        "teacher": teacher,
        "teacher_rows": inputs.teacher_rows,
        "kd_weights": inputs.kd_weights,
        "beta": 0.3,
        **changes,
    }
    return linear_distill_loss(leaves[0], leaves[1], bias=leaves[2], **arguments), leaves


def test_a_scaled_loss_scales_every_gradient(setting):
    inputs, teacher, want = setting
    output, leaves = _loss(inputs, teacher)
    (output.loss / 3).backward()
    for leaf, name in zip(leaves, ("hidden", "weight", "bias"), strict=True):
        assert_close(leaf.grad, want.grads[name] / 3, 5e-5, name)


def test_a_bf16_gradient_is_scaled_in_fp32(setting):
    inputs, teacher, _ = setting
    inputs.hidden, inputs.weight, inputs.bias = (
        inputs.hidden.bfloat16(),
        inputs.weight.bfloat16(),
        inputs.bias.bfloat16(),
    )
    output, leaves = _loss(inputs, teacher)
    (unit,) = torch.autograd.grad(output.loss, leaves[1], retain_graph=True)
    (third,) = torch.autograd.grad(output.loss / 3, leaves[1])
    ratio = float((third.double() * unit.double()).sum() / unit.double().square().sum())
    assert abs(ratio * 3 - 1) < 1e-3  # 1/3 rounded to bf16 is off by 2e-3


def test_gradients_accumulate_over_calls(setting):
    inputs, teacher, want = setting
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (inputs.hidden, inputs.weight)]
    for _ in range(2):
        options = {"teacher": teacher, "teacher_rows": inputs.teacher_rows, "kd_weights": inputs.kd_weights}
        linear_distill_loss(
            *leaves, bias=inputs.bias, labels=inputs.labels, ce_weights=inputs.ce_weights, **options
        ).loss.backward()
    assert_close(leaves[1].grad, 2 * want.grads["weight"], 5e-5)


def test_a_second_backward_gives_the_same_gradient_again(setting):
    inputs, teacher, want = setting
    output, leaves = _loss(inputs, teacher)
    (5 * output.loss).backward(retain_graph=True)
    for leaf in leaves:
        leaf.grad = None
    output.loss.backward()
    for leaf, name in zip(leaves, ("hidden", "weight", "bias"), strict=True):
        assert_close(leaf.grad, want.grads[name], 5e-5, name)


def test_differentiating_the_gradient_is_refused(setting):
    inputs, teacher, _ = setting
    output, leaves = _loss(inputs, teacher)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(output.loss, leaves, create_graph=True)
    logits = torch.randn(3, 9, requires_grad=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(distill_loss(logits, torch.randn(3, 9)), logits, create_graph=True)


def test_only_the_loss_has_a_gradient(setting):
    inputs, teacher, _ = setting
    output, _ = _loss(inputs, teacher)
    assert output.loss.requires_grad
    assert not (output.ce.requires_grad or output.kd.requires_grad or output.logsumexp.requires_grad)


def test_without_grad_the_loss_is_the_same_and_no_gradient_is_computed(setting, monkeypatch):
    inputs, teacher, want = setting
    monkeypatch.setattr(segments.HeadResult, "add_product", None)
    with torch.no_grad():
        output, _ = _loss(inputs, teacher)
    assert not output.loss.requires_grad
    assert_close(output.loss[None], want.loss[None], 1e-5)


def test_a_frozen_head_costs_no_weight_product(setting, monkeypatch):
    inputs, teacher, want = setting
    monkeypatch.setattr(segments, "accumulate_", None)
    hidden = inputs.hidden.clone().requires_grad_()
    output = linear_distill_loss(
        hidden, inputs.weight, bias=inputs.bias, labels=inputs.labels, ce_weights=inputs.ce_weights,
        teacher=teacher, teacher_rows=inputs.teacher_rows, kd_weights=inputs.kd_weights,
    )  # fmt: skip
    output.loss.backward()
    assert_close(hidden.grad, want.grads["hidden"], 5e-5)


def test_a_frozen_trunk_costs_no_hidden_product(setting, monkeypatch):
    inputs, teacher, want = setting
    monkeypatch.setattr(segments.HeadResult, "store_hidden", None)
    weight = inputs.weight.clone().requires_grad_()
    output = linear_distill_loss(
        inputs.hidden, weight, bias=inputs.bias, labels=inputs.labels, ce_weights=inputs.ce_weights,
        teacher=teacher, teacher_rows=inputs.teacher_rows, kd_weights=inputs.kd_weights,
    )  # fmt: skip
    output.loss.backward()
    assert_close(weight.grad, want.grads["weight"], 5e-5)


def test_the_values_of_the_weight_are_used_in_the_forward_only(setting):
    inputs, teacher, want = setting
    output, leaves = _loss(inputs, teacher)
    with torch.no_grad():
        leaves[1].data.fill_(float("nan"))  # what a partitioned parameter's storage may hold by then
    output.loss.backward()
    assert_close(leaves[0].grad, want.grads["hidden"], 5e-5)
    assert_close(leaves[1].grad, want.grads["weight"], 5e-5)


def test_tied_embeddings_receive_both_gradients():
    table = torch.randn(40, 8, dtype=F64, requires_grad=True)
    tokens, labels = torch.randint(0, 40, (6,)), torch.randint(0, 40, (6,))
    linear_distill_loss(torch.tanh(table[tokens]), table, labels=labels).loss.backward()
    got, table.grad = table.grad, None
    nn.functional.cross_entropy(torch.tanh(table[tokens]) @ table.T, labels, reduction="sum").backward()
    assert_close(got, table.grad, 1e-12)


def test_gradcheck_in_fp64():
    hidden, weight, bias = (torch.randn(*shape, dtype=F64, requires_grad=True) for shape in ((5, 4), (9, 4), (9,)))
    teacher = DenseTeacher(torch.randn(3, 4, dtype=F64), torch.randn(9, 4, dtype=F64))
    labels, rows = torch.tensor([1, -100, 3, 8, 0]), torch.tensor([4, 0, 1])

    def loss(hidden, weight, bias, **options):
        options = {"labels": labels, "teacher": teacher, "teacher_rows": rows, "z_loss": 0.1, "softcap": 3.0, **options}
        return linear_distill_loss(hidden, weight, bias=bias, **options).loss

    for divergence in ("forward_kl", "reverse_kl", "jsd", "mse"):
        assert torch.autograd.gradcheck(
            lambda *t, d=divergence: loss(*t, divergence=d, temperature=1.7), (hidden, weight, bias)
        )
    stored = linear_topk(teacher.hidden, teacher.weight, 3)
    for divergence in ("forward_kl", "reverse_kl", "jsd", "mse"):
        assert torch.autograd.gradcheck(
            lambda *t, d=divergence: loss(*t, divergence=d, teacher=stored), (hidden, weight, bias)
        )


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_tensors_own():
    case = Case()
    inputs = make_inputs(case)
    teacher = make_teacher(case, inputs)
    with torch.autocast("cpu", dtype=BF16):
        output, grads = run(case, inputs, teacher)
    assert output.loss.dtype == torch.float32
    rounded = make_inputs(case)
    for name in ("hidden", "weight", "teacher_hidden", "teacher_weight"):
        setattr(rounded, name, getattr(rounded, name).bfloat16())
    want = truth(case, rounded)
    assert_close(output.loss[None], want.loss[None], 1e-4)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert_close(grad, want.grads[name], 1e-4, name)


def test_under_autocast_a_student_equal_to_its_teacher_still_has_a_loss_of_exactly_zero():
    case = Case(drift=0.0, labels="none", teacher_rows="all")
    inputs = make_inputs(case)
    with torch.autocast("cpu", dtype=BF16):
        output, grads = run(case, inputs, make_teacher(case, inputs))
    assert_zero(output.kd)
    assert_zero(grads["weight"])


def test_in_inference_mode_there_is_a_loss_and_no_gradient(setting):
    inputs, teacher, want = setting
    with torch.inference_mode():
        output, _ = _loss(inputs, teacher)
    assert_close(output.loss[None], want.loss[None], 1e-5)


def test_autocast_takes_bf16_hidden_states_and_an_fp32_head():
    hidden, weight = torch.randn(6, 16).bfloat16().requires_grad_(), torch.randn(40, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=BF16):
        linear_distill_loss(hidden, weight, labels=torch.arange(6)).loss.backward()
    assert hidden.grad.dtype == BF16 and weight.grad.dtype == torch.float32


def test_fp16_gradients_survive_small_weights_because_the_loss_scale_comes_later():
    case = Case(dtype=torch.float16, labels="all", teacher_rows="all", vocab=200, std=1.0)
    inputs = make_inputs(case)
    inputs.ce_weights, inputs.kd_weights = inputs.ce_weights * 1e-7, inputs.kd_weights * 1e-7
    want = truth(case, inputs)
    leaves = [tensor.clone().requires_grad_() for tensor in (inputs.hidden, inputs.weight)]
    output = linear_distill_loss(
        *leaves,
        labels=inputs.labels,
        ce_weights=inputs.ce_weights,
        teacher=make_teacher(case, inputs),
        kd_weights=inputs.kd_weights,
    )
    (output.loss * 2.0**20).backward()
    assert_close(output.loss[None], want.loss[None], 1e-4)
    for leaf, name in zip(leaves, ("hidden", "weight"), strict=True):
        assert_close(leaf.grad, want.grads[name] * 2.0**20, 2e-3, name)


def test_strides_do_not_matter():
    case = Case(labels="all", teacher_rows="all", bias=True)
    inputs = make_inputs(case)
    want, want_grads = run(case, inputs, make_teacher(case, inputs))
    teacher = make_teacher(case, inputs)
    teacher = DenseTeacher(teacher.hidden.t().contiguous().t(), teacher.weight.t().contiguous().t(), teacher.bias)
    hidden = inputs.hidden.t().contiguous().t().requires_grad_()
    weight = inputs.weight.t().contiguous().t().requires_grad_()
    spread = torch.stack([inputs.labels, inputs.labels], 1)[:, 0]
    output = linear_distill_loss(
        hidden,
        weight,
        bias=inputs.bias,
        labels=spread,
        ce_weights=inputs.ce_weights,
        teacher=teacher,
        kd_weights=inputs.kd_weights,
    )
    output.loss.backward()
    assert_close(weight.grad, want_grads["weight"], 2e-5)
    assert_close(hidden.grad, want_grads["hidden"], 2e-5)
    assert_close(output.ce, want.ce, 1e-6)


def _compiled_objective(hidden, weight, labels, teacher_hidden, rows):
    teacher = linear_topk(teacher_hidden, weight.detach(), 5)
    mixed = linear_distill_loss(2 * hidden, weight, labels=labels, ce_weights=0.1, teacher=teacher, teacher_rows=rows)
    return mixed.loss + distill_loss(hidden @ weight.T, hidden.detach() @ weight.T + 1, divergence="jsd"), mixed.kd


def test_it_compiles_into_one_graph():
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    arguments = (hidden, weight, torch.randint(0, 50, (6,)), torch.randn(3, 8), torch.tensor([0, 2, 4]))
    want, want_kd = _compiled_objective(*arguments)
    want_grads = torch.autograd.grad(want, (hidden, weight))
    torch._dynamo.reset()
    got, got_kd = torch.compile(_compiled_objective, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(got_kd, want_kd)
    for grad, expected in zip(torch.autograd.grad(got, (hidden, weight)), want_grads, strict=True):
        assert_close(grad, expected, 1e-5)


def test_the_operators_registrations_are_consistent(monkeypatch):
    seen = []
    operator = calls._linear_distill
    monkeypatch.setattr(calls, "_linear_distill", lambda *arguments: seen.append(arguments) or operator(*arguments))
    case = Case(tokens=4, vocab=30, width=5, bias=True, teacher_rows="all")
    inputs = make_inputs(case)
    run(case, inputs, make_teacher(case, inputs))
    torch.library.opcheck(
        operator,
        seen[0],
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


class _Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.head = nn.Linear(6, 8), nn.Linear(8, 40, bias=False)

    def forward(self, x, labels):
        return {
            "loss": linear_distill_loss(self.trunk(x), self.head.weight, labels=labels, ce_weights=1 / len(labels)).loss
        }


def test_inside_a_module_it_trains_like_cross_entropy():
    module = _Wrapped()
    x, labels = torch.randn(20, 6), torch.randint(0, 40, (20,))
    module(x, labels)["loss"].backward()
    got = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    nn.functional.cross_entropy(module.head(module.trunk(x)), labels).backward()
    for grad, parameter in zip(got, module.parameters(), strict=True):
        assert_close(grad, parameter.grad, 1e-5)


def test_a_rank_without_supervised_tokens_can_still_run_its_backward():
    module = _Wrapped()
    module(torch.randn(4, 6), torch.full((4,), -100))["loss"].backward()
    for parameter in module.parameters():
        assert_zero(parameter.grad)
