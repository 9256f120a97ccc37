"""The streamed teacher on a GPU: copies on a side stream, overlapped with compute (launch/gpu_suite.sh runs these)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from safecl.engine.passes.step_rows import Question
from safecl.engine.teachers.streamed import StreamedTeacher
from safecl.engine.teachers.weight_stream import WeightStream
from tests.engine.teachers.test_teacher import batches, built, distance

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CUDA = torch.device("cuda", 0)


@torch.no_grad()
@pytest.mark.parametrize("placement", ["streamed", "resident"])
@pytest.mark.parametrize(
    ("name", "dtype", "limit"), [("llama", torch.float32, 1e-5), ("gemma3", torch.bfloat16, 2**-8)]
)
def test_hidden_states_and_logits_are_the_plain_models(tmp_path, name, dtype, limit, placement):
    model, empty, store = built(name, tmp_path, dtype)
    teacher = StreamedTeacher(empty, store, CUDA, placement)
    model.to(CUDA)
    for batch in batches():
        inputs = dict(
            input_ids=batch.input_ids.to(CUDA),
            position_ids=batch.position_ids.to(CUDA),
            attention_mask=None,
            use_cache=False,
        )
        hidden = model.get_decoder()(**inputs).last_hidden_state.flatten(0, 1)
        batch.asked = [(Question("hidden", True), torch.arange(len(hidden)))]
        for _ in range(3):  # buffers that are used again
            assert distance(teacher.answer([batch])[0][0], hidden) <= limit
            assert distance(teacher.logits(batch), model(**inputs).logits.float()) <= limit


def test_a_slow_reader_never_sees_the_next_units_weights():
    """Compute lags far behind the copies: a buffer must wait for its last reader."""
    units = [{"weight": torch.full((2**22,), float(number)).pin_memory()} for number in range(6)]
    stream = WeightStream(units, CUDA, "streamed")
    for _ in range(2):
        sums = []
        for unit in stream.run(range(6)):
            torch.cuda._sleep(20_000_000)  # cycles
            sums.append(unit["weight"].mean())
        assert torch.stack(sums).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_slow_copy_is_waited_for():
    units = [{"weight": torch.full((2**26,), float(number + 1)).pin_memory()} for number in range(4)]
    stream = WeightStream(units, CUDA, "streamed")
    found = [unit["weight"][-1].clone() for unit in stream.run(range(4))]  # the last element arrives last
    assert torch.stack(found).tolist() == [1.0, 2.0, 3.0, 4.0]
