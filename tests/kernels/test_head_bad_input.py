"""The head refuses bad input with a message that says which argument is wrong and what would fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from safecl.kernels import DenseTeacher, LogitsTeacher, distill_loss, linear_distill_loss, linear_topk

H, V, M = 8, 50, 6
WEIGHT = torch.randn(V, H)
TOPK = linear_topk(torch.randn(M, H), WEIGHT, 4)
DENSE = DenseTeacher(torch.randn(M, H), WEIGHT)
DENSE_80 = DenseTeacher(torch.randn(M, H), torch.randn(80, H))
LABELS = torch.arange(M)

REFUSED = {
    "hidden of one dimension": ({"hidden": torch.randn(H)}, r"hidden must be \[tokens, hidden\]"),
    "integer hidden": ({"hidden": torch.zeros(M, H, dtype=torch.int64)}, "hidden must be floating point"),
    "weight of another width": ({"weight": torch.randn(V, 9)}, r"weight must be \[vocab, 8\].*\(50, 9\)"),
    "weight of another dtype": ({"weight": WEIGHT.bfloat16()}, "weight is torch.bfloat16 and hidden is torch.float32"),
    "bias of another length": ({"bias": torch.zeros(V + 1)}, r"bias must be \[50\]"),
    "weight on another device": ({"weight": WEIGHT.to("meta")}, "weight is on meta"),
    "labels of another length": ({"labels": torch.arange(M + 1)}, r"labels have shape \(7,\)"),
    "floating labels": ({"labels": torch.zeros(M)}, "labels must be integers"),
    "a label beyond the vocabulary": (
        {"labels": torch.full((M,), V)},
        r"labels must lie in 0\.\.49 or be ignore_index -100",
    ),
    "a negative label": ({"labels": torch.full((M,), -1)}, "labels must lie in"),
    "weights of another length": (
        {"labels": LABELS, "ce_weights": torch.ones(M - 1)},
        r"ce_weights must be a number or .* token \(6,\)",
    ),
    "weights that require grad": (
        {"kd_weights": torch.ones(M, requires_grad=True)},
        r"kd_weights requires grad.*detach",
    ),
    "an unknown divergence": ({"divergence": "kl"}, "divergence must be one of forward_kl, reverse_kl, jsd, mse"),
    "beta at its limit": (
        {"divergence": "jsd", "beta": 0.0},
        "beta must lie strictly between 0 and 1.*forward_kl or reverse_kl",
    ),
    "temperature 0": ({"temperature": 0.0}, "temperature must be a positive number"),
    "an unknown temperature scale": ({"temperature_scale": "T2"}, "temperature_scale must be one of none, square"),
    "a negative softcap": ({"softcap": -1.0}, "softcap must be a positive number or None"),
    "logit scale 0": ({"logit_scale": 0.0}, "logit_scale must be a positive number or None"),
    "no memory": ({"tile_bytes": 0}, "tile_bytes must be at least 1"),
    "rows without a teacher": ({"teacher_rows": torch.arange(2)}, "teacher_rows is given without a teacher"),
    "no teacher at all": (
        {"teacher": WEIGHT},
        "teacher must be a DenseTeacher, TopKTeacher, LogitsTeacher or None, got Tensor",
    ),
    "a teacher of fewer rows": (
        {"teacher": DenseTeacher(torch.randn(3, H), WEIGHT)},
        "the teacher has 3 rows for 6 tokens.*teacher_rows",
    ),
    "rows that do not fit": (
        {"teacher": DENSE, "teacher_rows": torch.arange(4)},
        "teacher_rows names 4 tokens, the teacher has 6 rows",
    ),
    "rows twice": (
        {"teacher": DENSE, "teacher_rows": torch.tensor([0, 1, 2, 3, 4, 4])},
        "teacher_rows names a token twice",
    ),
    "rows outside": ({"teacher": DENSE, "teacher_rows": torch.arange(1, 7)}, r"teacher_rows must lie in 0\.\.5"),
    "floating rows": ({"teacher": DENSE, "teacher_rows": torch.rand(M)}, r"teacher_rows must be \[rows\] integers"),
    "a teacher's head of another width": (
        {"teacher": DenseTeacher(torch.randn(M, 9), WEIGHT)},
        r"teacher weight must be \[vocab, 9\]",
    ),
    "a dense teacher of another vocabulary": ({"teacher": DENSE_80}, "80 tokens, the student 50: more than padding"),
    "cached logits of another vocabulary": (
        {"teacher": LogitsTeacher(torch.randn(M, 20))},
        "20 tokens, the student 50",
    ),
    "integer logits": (
        {"teacher": LogitsTeacher(torch.zeros(M, V, dtype=torch.int8))},
        r"teacher logits must be \[rows, vocab\] floating",
    ),
    "a top-k teacher of another vocabulary": (
        {"teacher": replace(TOPK, vocab_size=51)},
        "made for a vocabulary of 51.*head has 50",
    ),
    "a top-k teacher of another temperature": (
        {"teacher": TOPK, "temperature": 2.0},
        "made at temperature 1.0, the loss asks for 2.0",
    ),
    "an unknown mode": ({"teacher": replace(TOPK, mode="ghost")}, "teacher mode must be one of tail, truncated"),
    "a tail of another length": (
        {"teacher": replace(TOPK, log_tail=torch.zeros(2))},
        r"must be \[rows, k\], \[rows, k\], \[rows\]",
    ),
    "floating indices": ({"teacher": replace(TOPK, indices=TOPK.log_probs)}, "indices integers"),
    "an index beyond the vocabulary": (
        {"teacher": replace(TOPK, indices=TOPK.indices + V)},
        r"teacher indices must lie in 0\.\.49",
    ),
    "an index twice": (
        {"teacher": replace(TOPK, indices=torch.zeros_like(TOPK.indices))},
        "name a token twice in one row",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_message_that_says_which(name):
    changes, message = REFUSED[name]
    arguments = {"hidden": torch.randn(M, H), "weight": WEIGHT, **changes}
    with pytest.raises(ValueError, match=message):
        linear_distill_loss(**arguments)


def test_linear_topk_refuses_a_k_that_does_not_fit():
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.50"):
        linear_topk(torch.randn(M, H), WEIGHT, 51)
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.50"):
        linear_topk(torch.randn(M, H), WEIGHT, 0)
    with pytest.raises(ValueError, match=r"hidden must be \[rows, hidden\]"):
        linear_topk(torch.randn(2, 3, H), WEIGHT, 2)


def test_distill_loss_refuses_logits_that_do_not_belong_together():
    student = torch.randn(M, V)
    for teacher, message in (
        (torch.randn(M + 1, V), "over the same tokens"),
        (torch.randn(M, 30), "30 tokens, the student 50"),
        (torch.zeros(M, V, dtype=torch.int64), "logits must be floating point"),
    ):
        with pytest.raises(ValueError, match=message):
            distill_loss(student, teacher)
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none"):
        distill_loss(student, student, reduction="batchmean")
