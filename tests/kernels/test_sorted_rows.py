"""Rows that the host has sorted: the same bits as without, no question to the device, and the same refusals."""

from __future__ import annotations

import pytest
import torch

from safecl.kernels import TopKTeacher, linear_distill_loss, sort_rows
from safecl.kernels.head import segments
from tests.kernels.head_oracle import Case, make_inputs
from tests.kernels.head_suite import make_teacher, run

CASES = {
    "labels alone": Case(teacher=None),
    "labels and a dense teacher of some rows": Case(bias=True),
    "a stored teacher": Case(teacher="topk", k=5),
}


def sorted_for(case: Case, inputs, teacher):
    has_teacher = teacher is not None
    tokens = inputs.hidden.shape[0]
    rows = inputs.teacher_rows if inputs.teacher_rows is not None else torch.arange(tokens)
    return sort_rows(
        tokens,
        vocab=case.vocab,
        labels=inputs.labels,
        ce_weights=inputs.ce_weights,
        teacher_rows=rows if has_teacher else None,
        kd_weights=inputs.kd_weights if has_teacher else None,
        indices=teacher.indices if isinstance(teacher, TopKTeacher) else None,
    )


@pytest.mark.parametrize("name", CASES)
def test_the_bits_are_those_of_rows_that_the_device_sorts(name, monkeypatch):
    case = CASES[name]
    inputs = make_inputs(case)
    teacher = make_teacher(case, inputs)
    expected, gradients = run(case, inputs, teacher)
    known = sorted_for(case, inputs, teacher)
    monkeypatch.setattr(segments, "_sort_on_device", lambda *arguments: pytest.fail("the device is asked"))
    found, own = run(case, inputs, teacher, sorted_rows=known)
    for field in ("loss", "ce", "kd", "logsumexp"):
        assert torch.equal(getattr(found, field), getattr(expected, field)), field
    assert all(torch.equal(own[key], gradients[key]) for key in gradients)


def test_kinds_of_work_are_counted_and_weights_of_zero_take_none():
    known = sort_rows(
        6,
        vocab=9,
        labels=torch.tensor([-100, 1, 2, 3, -100, 5]),
        ce_weights=torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, -1.0]),
        teacher_rows=torch.tensor([3, 4, 0]),
        kd_weights=torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    )
    assert known["order"].tolist() == [0, 2, 1, 5, 4, 3] and known["counts"] == [2, 2, 1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([1, 9])}, "labels must lie in 0..8"),
        ({"teacher_rows": torch.tensor([0, 2])}, "teacher_rows must lie in 0..1"),
        ({"teacher_rows": torch.tensor([1, 1])}, "names a token twice"),
        ({"indices": torch.tensor([[0, 9], [1, 2]])}, "teacher indices must lie in 0..8"),
    ],
)
def test_values_out_of_range_are_refused(changes, message):
    arguments = {"labels": torch.tensor([1, 2]), "ce_weights": torch.ones(2), "kd_weights": torch.ones(2)} | changes
    with pytest.raises(ValueError, match=message):
        sort_rows(2, vocab=9, **arguments)


def test_rows_of_another_call_are_refused():
    hidden, weight = torch.randn(3, 4), torch.randn(9, 4)
    known = sort_rows(2, vocab=9, labels=torch.tensor([1, 2]), ce_weights=torch.ones(2))
    with pytest.raises(ValueError, match="sorted_rows must be those of 3 tokens"):
        linear_distill_loss(hidden, weight, labels=torch.tensor([1, 2, 3]), sorted_rows=known)
