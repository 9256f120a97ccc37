from __future__ import annotations

import pytest
import torch
import transformers

from safecl.evaluation import HFEvalModel, generate_greedy, log_likelihoods
from safecl.training.output.heartbeat import how_far
from tests.evaluation.models import FAMILIES, VOCAB, ScriptedModel, random_prompts, tiny_model

NEW = 12


def hf_answers(model, prompts, eos, num_new=NEW):
    """Return the answers of transformers' own generate, one prompt at a time, without the end token."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        ends = {"eos_token_id": eos or [VOCAB], "pad_token_id": 0}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_new, **ends)
        new = out[0, len(prompt) :].tolist()
        answers.append(new[: next((i for i, token in enumerate(new) if token in eos), len(new))])
    return answers


def end_tokens(model, prompts):
    """Tokens that this model gives early in one answer and late in another."""
    free = hf_answers(model, prompts, [])
    return sorted({free[0][2], free[1][7]})


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_answers_equal_those_of_transformers_generate(family):
    model = tiny_model(family)
    prompts = random_prompts(9, seed=1)
    eos = end_tokens(model, prompts)
    expected = hf_answers(model, prompts, eos)
    assert len({len(answer) for answer in expected}) > 2, "the case must have answers that stop early and late"
    got = generate_greedy(HFEvalModel(model), prompts, max_new_tokens=NEW, eos_ids=eos, pad_id=0, batch_size=4)
    assert got == expected


@pytest.mark.parametrize(
    ("family", "attention"), [("llama", "sdpa"), ("llama", "eager"), ("mistral", "sdpa"), ("gemma2", "eager")]
)
def test_batch_size_does_not_change_the_answers(family, attention):
    model = tiny_model(family, seed=2)
    model.set_attn_implementation(attention)
    prompts = random_prompts(7, seed=3)
    eos = end_tokens(model, prompts)
    by_size = [
        generate_greedy(HFEvalModel(model), prompts, max_new_tokens=NEW, eos_ids=eos, pad_id=0, batch_size=size)
        for size in (1, 2, 3, 7, 50)
    ]
    assert by_size.count(by_size[0]) == len(by_size)


def test_answers_and_scored_rows_are_counted_while_they_are_made():
    model, seen = HFEvalModel(tiny_model("llama")), []
    own = model.any
    model.any = lambda value: (seen.append(how_far().partition(", about")[0]), own(value))[1]
    prompts = random_prompts(5, seed=1)
    generate_greedy(model, prompts, max_new_tokens=1, eos_ids=[], pad_id=0, batch_size=2)
    assert list(dict.fromkeys(seen)) == ["", *(f": {done} of 5 answers" for done in (0, 2, 4, 5))]
    seen.clear()
    log_likelihoods(model, [(ids, [True] * len(ids)) for ids in prompts], pad_id=0, logits_bytes=1)
    assert seen[:2] == [": 0 of 5 rows", ": 1 of 5 rows"] and seen[-1] == ": 5 of 5 rows" and how_far() == ""


def test_generation_stops_when_every_answer_of_the_batch_has_ended():
    model = ScriptedModel({(5, 6): [7, 8, 2], (5,): [9, 2]}, vocab_size=12)
    assert generate_greedy(model, [[5, 6], [5]], max_new_tokens=50, eos_ids=[2], pad_id=0, batch_size=2) == [
        [7, 8],
        [9],
    ]
    assert model.calls == 3


def test_an_answer_without_an_end_has_as_many_tokens_as_allowed():
    model = ScriptedModel({(5,): [7] * 20}, vocab_size=12)
    assert generate_greedy(model, [[5]], max_new_tokens=4, eos_ids=[2], pad_id=0, batch_size=2) == [[7] * 4]
    assert model.calls == 4


def test_the_padding_token_may_be_an_end_token_and_may_stand_in_an_answer():
    model = ScriptedModel({(5,): [7, 2], (6,): [0, 7, 0, 2]}, vocab_size=12)
    assert generate_greedy(model, [[5], [6]], max_new_tokens=9, eos_ids=[2], pad_id=0, batch_size=2) == [[7], [0, 7, 0]]
    assert generate_greedy(model, [[5], [6]], max_new_tokens=9, eos_ids=[2], pad_id=2, batch_size=2) == [[7], [0, 7, 0]]


def test_no_prompts_give_no_answers_and_no_forward_pass():
    model = ScriptedModel({}, vocab_size=12)
    assert generate_greedy(model, [], max_new_tokens=4, eos_ids=[2], pad_id=0, batch_size=2) == []
    assert model.calls == 0


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        generate_greedy(ScriptedModel({}, 12), [[5], []], max_new_tokens=4, eos_ids=[2], pad_id=0, batch_size=2)


def test_an_answer_ends_at_the_models_last_position_even_where_positions_are_a_table():
    """GPT-2 crashes beyond its table, also for a row of the batch that is done while the others go on."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=24, n_embd=32, n_layer=2, n_head=2, initializer_range=0.5
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    prompts = [random_prompts(1, seed=4, shortest=length, longest=length)[0] for length in (20, 3)]
    expected = [hf_answers(model, [prompt], [], num_new=min(NEW, 24 - len(prompt)))[0] for prompt in prompts]
    got = generate_greedy(HFEvalModel(model), prompts, max_new_tokens=NEW, eos_ids=[VOCAB], pad_id=0, batch_size=2)
    assert got == expected and [len(answer) for answer in got] == [4, NEW]


def test_a_prompt_that_leaves_no_room_is_refused():
    model = HFEvalModel(tiny_model())
    with pytest.raises(ValueError, match="prompt 0 has 128 tokens and leaves no room"):
        generate_greedy(model, [[5] * 128], max_new_tokens=9, eos_ids=[2], pad_id=0, batch_size=2)
