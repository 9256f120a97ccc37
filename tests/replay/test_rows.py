"""Odd rows come back as they were, or are refused by name."""

from __future__ import annotations

import numpy as np
import pytest

from safecl.data import Row
from safecl.replay import MemoryRow, ReplayBuffer, ReplayError, TeacherOutputs
from safecl.replay.files import codec
from tests.replay.samples import config, same_row, token_row, with_teacher


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 100_000])
def test_rows_of_any_length_come_back_as_they_were(length):
    buffer = ReplayBuffer(config())
    row = token_row(3, length=length)
    buffer.insert([row])
    assert same_row(buffer.get(0), row) and buffer.length(0) == length


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([], [], "non-empty list of token ids"),
        ([1, -2, 3], [0, 1, 1], "hold -2; token ids lie between"),
        ([1, 2**31, 3], [0, 1, 1], "hold 2147483648"),
        ([1.0, 2.0], [0, 1], "float64; token ids are whole numbers"),
        ([[1, 2]], [[0, 1]], r"shape \[1, 2\]"),
        ([1, 2], [0, 1, 1], "input_ids have 2 tokens"),
        ([1, 2], [0, 2], "values beyond 0 and 1"),
        ([1, 2], [1, 0], "marks position 0"),
        (["a", "b"], [0, 1], "whole numbers"),
    ],
)
def test_rows_that_are_none_are_refused_by_name_and_change_nothing(ids, mask, message):
    buffer = ReplayBuffer(config())
    with pytest.raises(ValueError, match=message) as told:
        buffer.insert([token_row(0), MemoryRow(Row(1, np.array(ids), np.array(mask)), source="bad.jsonl")])
    assert "row 1 of this insert (source 'bad.jsonl')" in str(told.value)
    assert buffer.keys() == [0]


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.uint32, np.int16, ">i4"])
def test_foreign_dtypes_are_taken_over(dtype):
    buffer = ReplayBuffer(config())
    buffer.insert([MemoryRow(Row(1, np.array([5, 6, 7], dtype), np.array([0, 1, 0], np.int64)))])
    row = buffer.get(0).row
    assert row.input_ids.dtype == np.int32 and row.input_ids.tolist() == [5, 6, 7]
    assert row.loss_mask.dtype == np.bool_ and row.loss_mask.tolist() == [False, True, False]


def test_outputs_that_do_not_fit_the_row_are_refused():
    buffer, good = ReplayBuffer(config()), with_teacher(token_row(1))
    outputs = good.teacher
    broken = {
        "supervised tokens": TeacherOutputs(outputs.log_probs[1:], outputs.indices[1:], outputs.log_tail[1:]),
        "do not fit log_probs": TeacherOutputs(outputs.log_probs, outputs.indices[:, 1:], outputs.log_tail),
        "store fp16": TeacherOutputs(outputs.log_probs.astype(np.float64), outputs.indices, outputs.log_tail),
        "indices hold -1": TeacherOutputs(outputs.log_probs, outputs.indices - outputs.indices - 1, outputs.log_tail),
        "NaN": TeacherOutputs(outputs.log_probs * np.float16("nan"), outputs.indices, outputs.log_tail),
    }
    for message, teacher in broken.items():
        with pytest.raises(ValueError, match=message):
            buffer.insert([MemoryRow(good.row, teacher=teacher)])
    assert len(buffer) == 0


@pytest.mark.parametrize("indices", ["int32", "packed"])
@pytest.mark.parametrize("vocab", [30_000, 150_000])
def test_outputs_in_fp16_and_fp32_come_back_bit_by_bit(indices, vocab):
    buffer = ReplayBuffer(config(teacher={"indices": indices}), vocab_size=vocab)
    row = token_row(1, tags={"category": "Gefährliches", "id": "7"})
    row.row.input_ids[:] %= 70
    fp16 = with_teacher(row, vocab=vocab).teacher
    kinds = [fp16, TeacherOutputs(fp16.log_probs.astype(np.float32), fp16.indices, fp16.log_tail), None]
    offered = [MemoryRow(row.row, tags=row.tags, teacher=teacher) for teacher in kinds]
    buffer.insert(offered)
    for key, original in enumerate(offered):
        assert type(buffer.get(key).teacher) is type(original.teacher) and same_row(buffer.get(key), original)


def test_a_row_with_outputs_of_a_reserved_kind_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(codec, "TOPK", 2)  # as memories of early versions have it
    buffer = ReplayBuffer(config())
    buffer.insert([with_teacher(token_row(1))])
    monkeypatch.undo()
    with pytest.raises(ReplayError, match="row 0 cannot be decoded: it has outputs of kind 2"):
        buffer.get(0)
