"""The head on a GPU: what the interpreter cannot show (launch/gpu_suite.sh runs these)."""

from __future__ import annotations

import pytest
import torch

from safecl.kernels import DenseTeacher, LogitsTeacher, backends, linear_distill_loss, linear_topk
from safecl.kernels.head.backend import RowOptions
from tests.kernels.closeness import assert_close, assert_zero
from tests.kernels.head_oracle import Case, make_inputs, truth
from tests.kernels.head_suite import BF16, CASES, F64, check, make_teacher, run
from tests.kernels.test_head_near_teacher import at_distance

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CUDA = "cuda"


@pytest.fixture(autouse=True)
def full_precision():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def test_cuda_tensors_run_in_triton():
    assert {c.backend for c in backends.table() if c.device == "cuda" and "distill" in c.kernel} == {"triton"}


@pytest.mark.parametrize("dtype", [torch.float32, BF16, F64], ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("name", CASES)
def test_every_case_matches_the_fp64_oracle(name, dtype):
    bound = {torch.float32: 5e-5, BF16: 8e-3, F64: 1e-6}[dtype]
    check(CASES[name].but(dtype=dtype), bound, CUDA)


@pytest.mark.parametrize("tokens", [1, 127, 511, 512, 513, 1029])
@pytest.mark.parametrize("teacher", ["dense", "topk", None])
def test_any_number_of_tokens(tokens, teacher):
    check(
        Case(
            tokens, width=64, vocab=5003, dtype=BF16, teacher=teacher, labels="all", teacher_rows="all", tile_rows=256
        ),
        8e-3,
        CUDA,
    )


@pytest.mark.parametrize("vocab", [7, 4095, 4096, 4097, 32003, 128256, 151936, 256000])
@pytest.mark.parametrize("teacher", ["dense", "topk"])
def test_any_width_of_the_vocabulary(vocab, teacher):
    check(
        Case(5, width=32, vocab=vocab, dtype=BF16, teacher=teacher, k=5, labels="all", teacher_rows="all"), 8e-3, CUDA
    )


@pytest.mark.parametrize("kl, bound", [(1e-3, 1e-2), (1e-5, 2e-2), (1e-6, 5e-2)])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("std", [2.0, 8.0], ids=["flat", "peaky"])
def test_gradient_and_loss_hold_near_the_teacher(kl, bound, divergence, std):
    case, inputs = at_distance(kl, divergence, BF16, std)
    want = truth(case, inputs)
    on_device = inputs.to(CUDA)
    output, grads = run(case, on_device, DenseTeacher(on_device.teacher_hidden, on_device.teacher_weight))
    assert (output.kd >= 0).all()
    assert_close(output.loss[None], want.loss[None], 1e-3, "loss")
    for name, grad in grads.items():
        assert_close(grad, want.grads[name], bound, name)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "mse"])
def test_a_student_equal_to_its_teacher_has_a_gradient_of_exactly_zero(divergence):
    case = Case(300, 64, 5000, BF16, divergence, drift=0.0, labels="none", teacher_rows="all", temperature=2.0)
    inputs = make_inputs(case).to(CUDA)
    output, grads = run(case, inputs, make_teacher(case, inputs))
    assert_zero(output.kd)
    for grad in grads.values():
        assert_zero(grad)


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "pageable"])
@pytest.mark.parametrize("rows", ["all", "some"])
def test_a_teacher_on_the_host_is_streamed_to_the_same_numbers(rows, pinned):
    case = Case(700, 32, 3000, BF16, teacher="logits", teacher_rows=rows, labels="all", tile_rows=48)
    inputs = make_inputs(case).to(CUDA)
    teacher = make_teacher(case, inputs)
    want, want_grads = run(case, inputs, teacher)
    host = teacher.logits.half().cpu()
    near, near_grads = run(case, inputs, LogitsTeacher(host.to(CUDA)))
    for _ in range(5):  # a race would not show every time
        output, grads = run(case, inputs, LogitsTeacher(host.pin_memory() if pinned else host))
        assert torch.equal(output.kd, near.kd)
        assert torch.equal(grads["hidden"], near_grads["hidden"])
    assert_close(near.kd, want.kd, 1e-2)
    assert_close(near_grads["weight"], want_grads["weight"], 2e-2)


def test_hidden_states_cached_on_the_host_are_streamed_too():
    case = Case(700, 32, 3000, BF16, teacher_rows="some", tile_rows=48)
    inputs = make_inputs(case).to(CUDA)
    teacher = make_teacher(case, inputs)
    want, _ = run(case, inputs, teacher)
    output, _ = run(case, inputs, DenseTeacher(teacher.hidden.cpu().pin_memory(), teacher.weight))
    assert torch.equal(output.kd, want.kd)


def test_offsets_beyond_two_to_the_31():
    rows, vocab = 16500, 131072  # 2.16e9 logits
    tile = torch.randn(1, vocab, device=CUDA).expand(rows, vocab).contiguous()
    labels = torch.full((rows,), vocab - 1, device=CUDA)
    ones = torch.ones(rows, device=CUDA)
    row = tile[-1].double()
    want = row.softmax(0)
    want[-1] -= 1
    kernels = backends.implementation("head", "linear_distill_loss", CUDA)
    losses = kernels.dense_rows(tile, None, labels, ones, ones, RowOptions(), tile)
    assert_close(losses.ce[-1:], -row.log_softmax(0)[-1:], 1e-5)
    assert_close(tile[-1], want, 1e-5)
    assert torch.equal(tile[0], tile[-1])


def test_dlogits_may_overwrite_the_tile_without_a_race():
    tile = 4 * torch.randn(512, 50_000, device=CUDA)
    labels, ones = torch.randint(0, 64, (512,), device=CUDA), torch.ones(512, device=CUDA)
    kernels = backends.implementation("head", "linear_distill_loss", CUDA)
    separate = torch.empty_like(tile)
    want = kernels.dense_rows(tile.clone(), None, labels, ones, ones, RowOptions(), separate)
    for _ in range(20):
        own = tile.clone()
        got = kernels.dense_rows(own, None, labels, ones, ones, RowOptions(), own)
        assert torch.equal(own, separate) and torch.equal(got.ce, want.ce)


@pytest.mark.parametrize("name", ["forward KL and CE", "top-k tail", "JSD"])
def test_two_runs_give_the_same_bits(name):
    case = CASES[name].but(dtype=BF16, tokens=600, vocab=20_000)
    inputs = make_inputs(case).to(CUDA)
    teacher = make_teacher(case, inputs)
    first, first_grads = run(case, inputs, teacher)
    for _ in range(3):
        again, grads = run(case, inputs, teacher)
        assert torch.equal(again.loss, first.loss)
        assert all(torch.equal(grads[key], first_grads[key]) for key in grads)


def test_more_stored_tokens_than_registers_hold():
    check(Case(40, 32, 5000, teacher="topk", k=1500, labels="all"), 5e-5, CUDA)


@pytest.mark.parametrize("trainable", [True, False], ids=["trainable head", "frozen head"])
def test_the_peak_stays_within_10cv_4vh_2mh(trainable):
    tokens, width, vocab = 8192, 4096, 128256
    hidden = torch.randn(tokens, width, device=CUDA, dtype=BF16, requires_grad=True)
    weight = (torch.randn(vocab, width, device=CUDA, dtype=BF16) / 16).requires_grad_(trainable)
    teacher = DenseTeacher(hidden.detach() + 0.1, weight.detach())
    labels = torch.randint(0, vocab, (tokens,), device=CUDA)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_distill_loss(
        hidden, weight, labels=labels, teacher=teacher, ce_weights=1 / tokens, kd_weights=1 / tokens
    ).loss.backward()
    torch.cuda.synchronize()
    returned = 2 * hidden.numel() + (2 * weight.numel() if trainable else 0)
    peak = torch.cuda.max_memory_allocated() - before - returned
    assert peak <= 10 * 1024 * vocab + (4 * vocab * width if trainable else 0) + 2 * tokens * width


def test_linear_topk_matches_a_full_softmax():
    hidden, weight = torch.randn(600, 64, device=CUDA, dtype=BF16), torch.randn(20_000, 64, device=CUDA, dtype=BF16) / 2
    teacher = linear_topk(hidden, weight, 64, temperature=1.5)
    log_q = (hidden.double() @ weight.double().T / 1.5).log_softmax(-1)
    assert_close(teacher.log_probs, log_q.topk(64).values, 1e-5)
    assert_close(teacher.log_tail.exp(), log_q.scatter(1, teacher.indices, -torch.inf).exp().sum(1), 1e-4)


def test_it_compiles_into_one_graph_with_inductor():
    hidden = torch.randn(64, 32, device=CUDA, dtype=BF16, requires_grad=True)
    weight = torch.randn(500, 32, device=CUDA, dtype=BF16, requires_grad=True)
    labels = torch.randint(0, 500, (64,), device=CUDA)

    def objective(hidden, weight):
        return linear_distill_loss(
            torch.tanh(hidden), weight, labels=labels, teacher=DenseTeacher(hidden.detach(), weight.detach())
        ).loss

    want = torch.autograd.grad(objective(hidden, weight), (hidden, weight))
    torch._dynamo.reset()
    got = torch.autograd.grad(torch.compile(objective, fullgraph=True)(hidden, weight), (hidden, weight))
    for grad, expected in zip(got, want, strict=True):
        assert_close(grad, expected, 2e-2)


def test_triton_and_the_torch_twin_agree_on_the_gpu():
    case = Case(200, 64, 9000, BF16, "jsd", labels="all", temperature=2.0)
    inputs = make_inputs(case).to(CUDA)
    teacher = make_teacher(case, inputs)
    output, grads = run(case, inputs, teacher)
    with backends.using("torch"):
        twin, twin_grads = run(case, inputs, teacher)
    assert_close(output.kd, twin.kd, 1e-5)
    assert_close(grads["weight"], twin_grads["weight"], 5e-3)
