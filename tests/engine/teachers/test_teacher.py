"""The streamed teacher gives the plain model's outputs, for every architecture, packed or not, through any buffers."""

from __future__ import annotations

import pytest
import torch
import transformers as T

from safecl.engine.model.structure import empty_model
from safecl.engine.passes.step_rows import Question
from safecl.engine.reference.store import ReferenceStore
from safecl.engine.teachers.questions import TeacherBatch
from safecl.engine.teachers.streamed import StreamedTeacher, head_slices
from safecl.engine.teachers.weight_stream import WeightStream, unit_bytes
from safecl.kernels import linear_topk
from tests.engine.scenes import VOCAB

CPU = torch.device("cpu")
SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=45,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GEMMA = dict(head_dim=8, sliding_window=5)
RECURRENT = dict(lru_width=32, attention_window_size=5, logits_soft_cap=0.2)
MODELS = {
    "llama": (T.LlamaForCausalLM, T.LlamaConfig, {}),
    "llama-tied": (T.LlamaForCausalLM, T.LlamaConfig, dict(tie_word_embeddings=True)),
    "mistral-sliding": (T.MistralForCausalLM, T.MistralConfig, dict(sliding_window=5)),
    "gemma": (T.GemmaForCausalLM, T.GemmaConfig, dict(head_dim=8)),
    "gemma2-softcap": (T.Gemma2ForCausalLM, T.Gemma2Config, GEMMA | dict(final_logit_softcapping=5.0)),
    "gemma3": (
        T.Gemma3ForCausalLM,
        T.Gemma3TextConfig,
        GEMMA | dict(layer_types=["sliding_attention", "full_attention"] * 2),
    ),
    "qwen2": (T.Qwen2ForCausalLM, T.Qwen2Config, {}),
    "qwen3-tied": (T.Qwen3ForCausalLM, T.Qwen3Config, dict(head_dim=8, tie_word_embeddings=True)),
    "falcon-tuples": (T.FalconForCausalLM, T.FalconConfig, dict(num_kv_heads=4)),
    "bloom-tuples": (T.BloomForCausalLM, T.BloomConfig, dict(n_head=4, n_layer=4)),
    "granite-scaled": (T.GraniteForCausalLM, T.GraniteConfig, dict(logits_scaling=4.0)),
    "recurrent-gemma": (T.RecurrentGemmaForCausalLM, T.RecurrentGemmaConfig, RECURRENT),
    "gpt-neox-renamed": (T.GPTNeoXForCausalLM, T.GPTNeoXConfig, {}),
    "phi3": (T.Phi3ForCausalLM, T.Phi3Config, {}),
    "gpt2": (T.GPT2LMHeadModel, T.GPT2Config, dict(n_embd=32, n_layer=4, n_head=4, n_positions=256)),
    "opt": (T.OPTForCausalLM, T.OPTConfig, dict(ffn_dim=48, word_embed_proj_dim=32)),
    "olmo2": (T.Olmo2ForCausalLM, T.Olmo2Config, {}),
    "cohere2-scaled": (T.Cohere2ForCausalLM, T.Cohere2Config, dict(sliding_window=5, logit_scale=0.25)),
    "qwen3.5-hybrid": (T.Qwen3_5ForCausalLM, T.Qwen3_5TextConfig, dict(head_dim=8)),
}
LENGTHS = (9, 12)


def built(name: str, folder, dtype: torch.dtype = torch.float32):
    """The model as transformers loads it from a folder, the structure of the teacher, and the store of that folder."""
    model_class, config_class, changes = MODELS[name]
    torch.manual_seed(7)
    model_class(config_class(**(SMALL | changes))).save_pretrained(folder)
    empty = empty_model(str(folder), dtype)
    model = T.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return model, empty, ReferenceStore.open(folder, dtype=dtype, model=empty)


def batches() -> list[TeacherBatch]:
    """Two padded rows, and two packed ones."""
    generator = torch.Generator().manual_seed(5)
    packed = torch.randint(3, VOCAB, (1, sum(LENGTHS)), generator=generator)
    restart = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    padded = torch.zeros(2, max(LENGTHS), dtype=torch.int64)
    padded[0, : LENGTHS[0]], padded[1] = packed[0, : LENGTHS[0]], packed[0, LENGTHS[0] :]
    return [TeacherBatch(padded, torch.arange(max(LENGTHS)).expand(2, -1)), TeacherBatch(packed, restart)]


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@torch.no_grad()
@pytest.mark.parametrize("placement", ["in place", "streamed", "resident"])
@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_and_logits_are_the_plain_models(tmp_path, name, placement):
    model, empty, store = built(name, tmp_path)
    teacher = StreamedTeacher(empty, store, CPU, placement, slice_bytes=5000)
    for batch in batches():
        inputs = dict(input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=None, use_cache=False)
        hidden = model.get_decoder()(**inputs).last_hidden_state.flatten(0, 1)
        batch.asked = [(Question("hidden", True), torch.arange(len(hidden)))]
        assert torch.equal(teacher.answer([batch])[0][0], hidden)
        assert distance(teacher.logits(batch), model(**inputs).logits) <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_the_streamed_teacher_equals_the_resident_one_to_the_bit(tmp_path, name):
    _, empty, store = built(name, tmp_path)
    streamed = StreamedTeacher(empty, store, CPU, "streamed", slice_bytes=5000)
    resident = StreamedTeacher(empty_model(str(tmp_path), torch.float32), store, CPU, "resident", slice_bytes=5000)
    for batch in batches():
        assert torch.equal(streamed.logits(batch), resident.logits(batch))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma2-softcap", "gemma3", "qwen3-tied"])
def test_in_bf16_they_are_equal_within_rounding(tmp_path, name):
    model, empty, store = built(name, tmp_path, torch.bfloat16)
    teacher = StreamedTeacher(empty, store, CPU, "streamed")
    for batch in batches():
        inputs = dict(input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=None, use_cache=False)
        batch.asked = [(Question("hidden", True), torch.arange(batch.input_ids.numel()))]
        hidden = model.get_decoder()(**inputs).last_hidden_state.flatten(0, 1)
        assert distance(teacher.answer([batch])[0][0], hidden) <= 1e-3
        assert distance(teacher.logits(batch), model(**inputs).logits.float()) <= 2**-8


@torch.no_grad()
def test_packed_rows_are_the_rows_alone(tmp_path):
    _, empty, store = built("mistral-sliding", tmp_path)
    padded, packed = batches()
    teacher = StreamedTeacher(empty, store, CPU, "in place")
    together, alone = teacher.logits(packed)[0], teacher.logits(padded)
    assert distance(together[: LENGTHS[0]], alone[0, : LENGTHS[0]]) <= 1e-5
    assert distance(together[LENGTHS[0] :], alone[1]) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-tied", "gemma2-softcap", "granite-scaled"])
def test_several_questions_about_several_batches_take_one_pass(tmp_path, name):
    model, empty, store = built(name, tmp_path)
    teacher = StreamedTeacher(empty, store, CPU, "streamed", slice_bytes=5000)
    asked = batches()
    some = torch.tensor([3, 1, 17])
    topk, warm, hidden = Question("topk", k=8), Question("topk", k=5, temperature=2.0), Question("hidden")
    asked[0].asked = [(topk, some), (hidden, some)]
    asked[1].asked = [(warm, torch.zeros(0, dtype=torch.int64)), (topk, some), (warm, some + 1)]
    said = teacher.answer(asked)
    assert teacher.stream.num_copied_bytes <= sum(map(unit_bytes, teacher.stream.units)) + unit_bytes(
        teacher.stream.units[0]
    )
    for batch, answers in zip(asked, said, strict=True):
        inputs = dict(input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=None, use_cache=False)
        states = model.get_decoder()(**inputs).last_hidden_state.flatten(0, 1)
        for (question, positions), answer in zip(batch.asked, answers, strict=True):
            if question.form == "hidden":
                assert torch.equal(answer, states[positions])
                continue
            weight, scaling = model.lm_head.weight, teacher.scaling
            expected = linear_topk(
                states[positions], weight, question.k, temperature=question.temperature, softcap=scaling.softcap,
                logit_scale=scaling.logit_scale,
            )  # fmt: skip
            assert torch.equal(answer.indices, expected.indices) and answer.temperature == question.temperature
            torch.testing.assert_close(answer.log_probs, expected.log_probs, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(answer.log_tail, expected.log_tail, rtol=1e-5, atol=1e-6)


def test_two_buffers_of_the_largest_layer_are_all_that_is_held(tmp_path):
    _, empty, store = built("llama", tmp_path)
    teacher = StreamedTeacher(empty, store, CPU, "streamed")
    layer = max(map(unit_bytes, teacher.stream.units[: len(teacher.layers)]))
    assert teacher.stream.buffer_bytes == 2 * layer
    assert StreamedTeacher(empty_model(str(tmp_path), torch.float32), store, CPU, "in place").stream.buffer_bytes == 0
    small = {name for name, p in empty.named_parameters() if not p.is_meta}
    assert small == {"model.norm.weight"}


def test_a_wider_head_is_cut_to_the_students_vocabulary(tmp_path):
    _, empty, store = built("llama", tmp_path)
    batch = batches()[0]
    batch.asked = [(Question("topk", k=200), torch.arange(4))]
    teacher = StreamedTeacher(empty, store, CPU, "in place", vocab_size=100)
    (answer,) = teacher.answer([batch])[0]
    assert answer.vocab_size == 100 and answer.indices.shape == (4, 100) and int(answer.indices.max()) == 99


@pytest.mark.parametrize(("vocab", "most"), [(32000, 4600), (50257, 17000), (128, 64), (1000, 39), (7, 100)])
def test_slices_of_the_head_are_the_whole_in_multiples_of_a_tile_and_none_is_too_large(vocab, most):
    head = torch.nn.Linear(4, vocab)
    source = {"weight": head.weight.detach(), "bias": head.bias.detach()}
    reader = type("Source", (), {"tensor": staticmethod(source.__getitem__)})
    keys = {id(head.weight): "weight", id(head.bias): "bias"}
    slices = head_slices(head, keys, reader, None, most * 4 * 4)
    for name, whole in source.items():
        assert torch.equal(torch.cat([unit[name] for _, unit in slices]), whole)
    lengths = [len(unit["weight"]) for _, unit in slices]
    assert [start for start, _ in slices] == [sum(lengths[:i]) for i in range(len(lengths))]
    assert max(lengths) <= most and len(slices) <= -(-vocab // most) + 1
    assert most < 64 or all(start % 64 == 0 for start, _ in slices)


def test_units_come_in_any_order_and_the_next_one_is_fetched_while_one_is_used():
    units = [{"weight": torch.full((3, number + 1), float(number))} for number in range(5)]
    stream = WeightStream(units, CPU, "streamed")
    for order in ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [2], [4, 4, 1], []):
        for number, unit in zip(order, stream.run(order), strict=True):
            assert torch.equal(unit["weight"], units[number]["weight"])
            held = {slot.number for slot in stream._slots}
            assert number in held
    stream = WeightStream(units, CPU, "streamed")
    given = stream.run([0, 1, 2])
    next(given)
    assert {slot.number for slot in stream._slots} == {0, 1}
    next(given)
    assert {slot.number for slot in stream._slots} == {1, 2}
    given.close()


def test_the_example_in_the_docs_runs(tmp_path):
    import re
    from pathlib import Path

    built("llama", tmp_path, torch.bfloat16)
    (example,) = re.findall(
        r"```python\n(.*?)```", (Path(__file__).parents[3] / "docs" / "teachers.md").read_text(), re.S
    )
    scope: dict = {}
    exec(compile(example.replace("path/of/model", str(tmp_path)), "docs/teachers.md", "exec"), scope)
    assert scope["topk"].indices.shape == (2, 8) and scope["hidden"].shape == (4, 32)


def test_break_even_is_the_flop_rate_over_the_link_rate():
    from safecl.engine.teachers.break_even import ASSUMED, Rates, advice, alternative

    assert ASSUMED.break_even(2) == 10_600
    rates = Rates(flop=1e12, link=1e9, what="here")
    assert rates.break_even(2) == 1000 and rates.break_even(4) == 2000
    assert "too few" in advice(999, 2, rates) and "too few" not in advice(1000, 2, rates)
    assert "recorded" in advice(999, 2, rates, otherwise=alternative("aligned")) and alternative("ema") == ""
