"""The chunk plan, and the GPU's arithmetic emulated on a CPU: 16-bit operands, fp32 products, 16-bit dlogits."""

from __future__ import annotations

import pytest
import torch

from safecl.kernels import DenseTeacher
from safecl.kernels.head import chunks, matmul, segments, teacher_tiles, topk
from safecl.kernels.head.backend import RowOptions
from safecl.kernels.head.chunks import plan_rows
from safecl.kernels.head.segments import HeadCall, Segment
from tests.kernels.closeness import assert_close
from tests.kernels.head_oracle import Case, make_inputs, truth
from tests.kernels.head_suite import BF16, CASES, check, make_teacher, run
from tests.kernels.test_head_near_teacher import at_distance


@pytest.fixture
def gpu_arithmetic(monkeypatch):
    """Replace cuBLAS's mm(out_dtype=fp32) by widened operands; all else, also padded rows, takes the GPU's path."""

    def project(x, weight, bias, out):
        torch.mm(x.float(), weight.float().t(), out=out)
        return out if bias is None else out.add_(bias)

    def accumulate_(total, dlogits, x, first):
        torch.addmm(total, dlogits.float().t(), x.float(), beta=0 if first else 1, out=total)

    monkeypatch.setattr(matmul, "row_multiple", lambda device: 16)
    for module in (matmul, chunks, segments):
        monkeypatch.setattr(module, "operand_dtype", lambda compute, device: compute)
    for module in (matmul, segments):
        monkeypatch.setattr(module, "accumulate_", accumulate_)
    for module in (matmul, chunks, teacher_tiles, topk):
        monkeypatch.setattr(module, "project", project)


@pytest.mark.parametrize("name", CASES)
def test_collected_16_bit_gradients_in_padded_rows_match_the_oracle(name, gpu_arithmetic):
    case = CASES[name]
    wider = case.teacher_vocab and case.teacher_vocab + 3
    check(case.but(dtype=BF16, tokens=29, vocab=1003, teacher_vocab=wider, tile_rows=12), 8e-3)


def test_several_tiles_feed_one_product(gpu_arithmetic, monkeypatch):
    case = Case(dtype=BF16, tokens=40, labels="all", teacher_rows="all", tile_rows=16)
    products = []
    emulated = segments.accumulate_
    monkeypatch.setattr(
        segments,
        "accumulate_",
        lambda total, dlogits, *rest: products.append(dlogits.shape[0]) or emulated(total, dlogits, *rest),
    )
    inputs = make_inputs(case)
    run(case, inputs, make_teacher(case, inputs))
    assert products == [32, 8]  # budget of 16 rows: tiles of 8 rows of student and teacher, dlogits of 32


@pytest.mark.parametrize("kl, bound", [(1e-3, 1e-2), (1e-5, 2e-2)])
@pytest.mark.parametrize("std", [2.0, 8.0], ids=["flat", "peaky"])
def test_dlogits_rounded_after_the_difference_keep_the_gradient(kl, bound, std, gpu_arithmetic):
    case, inputs = at_distance(kl, "forward_kl", BF16, std)
    want = truth(case, inputs)
    output, grads = run(case, inputs, DenseTeacher(inputs.teacher_hidden, inputs.teacher_weight))
    assert_close(output.loss[None], want.loss[None], 1e-3, "loss")
    for name, grad in grads.items():
        assert_close(grad, want.grads[name], bound, name)


def test_logits_rounded_to_bf16_would_lose_the_gradient(gpu_arithmetic, monkeypatch):
    case, inputs = at_distance(1e-3, "forward_kl", BF16, 8.0)
    exact = chunks.project
    for module in (chunks, teacher_tiles):
        monkeypatch.setattr(module, "project", lambda *arguments: exact(*arguments).copy_(exact(*arguments).bfloat16()))
    _, grads = run(case, inputs, DenseTeacher(inputs.teacher_hidden, inputs.teacher_weight))
    want = truth(case, inputs).grads["hidden"]
    assert (grads["hidden"].double() - want).norm() > 0.3 * want.norm()


def _call(vocab: int, width: int, kind: str, teacher: list, trainable: bool = True) -> tuple[HeadCall, Segment]:
    meta = {"device": "meta", "dtype": BF16}
    tokens = torch.empty(8192, device="meta")
    call = HeadCall(
        torch.empty(8192, width, **meta),
        torch.empty(vocab, width, **meta),
        None,
        None,
        tokens,
        tokens,
        None,
        teacher,
        kind,
        RowOptions(),
        -100,
        BF16,
        BF16,
        2**30,
        True,
        trainable,
        False,
    )
    return call, Segment(None, None, 8192, has_label=True, has_teacher=kind != "none")


@pytest.mark.parametrize(
    "vocab, width, tile, chunk", [(32000, 4096, 2048, 8192), (128256, 4096, 512, 2048), (256000, 2304, 256, 1024)]
)
def test_the_budget_and_not_v_over_h_sets_the_chunks(vocab, width, tile, chunk, monkeypatch):
    monkeypatch.setattr(segments, "operand_dtype", lambda compute, device: compute)
    call, segment = _call(
        vocab,
        width,
        "dense",
        [torch.empty(8192, width, device="meta"), torch.empty(vocab, width, device="meta", dtype=BF16)],
    )
    assert plan_rows(call, segment) == (tile, chunk)
    assert tile * 8 * vocab + chunk * 2 * vocab <= 2**30


def test_a_tiny_budget_still_takes_one_row_at_a_time():
    call, segment = _call(1000, 8, "none", [])
    call.tile_bytes = 1
    assert plan_rows(call, segment) == (1, 1)
