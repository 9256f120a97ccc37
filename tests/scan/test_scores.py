"""A row's score is the model's own probability of a refusal after its prompts, in any stage and on any number of
ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from safecl.data import ChatRow, Message
from safecl.scan import own_refusals, refusal_scores
from safecl.scan.refusals import given_refusals
from safecl.scan.scores import prompts_of, score_prompts
from tests.engine.scenes import VOCAB, random_dataset, run_config, tiny_model
from tests.methods.scenes import make_run
from tests.scan import scenes

OPENINGS = [(5, 9, 11), (7,), (5, 8, 3, 12)]


def naive_score(model, prompt: list[int]) -> float:
    """The sum of probabilities, each refusal in a forward pass of its own."""
    total = 0.0
    for opening in OPENINGS:
        ids = torch.tensor([[*prompt, *opening]])
        log_p = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
        total += math.exp(sum(float(log_p[len(prompt) - 1 + i, token]) for i, token in enumerate(opening)))
    return math.log(total)


def test_scores_equal_one_forward_pass_per_refusal():
    from safecl.evaluation import HFEvalModel

    model = tiny_model().eval()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCAB, length).tolist() for length in (1, 2, 7, 7, 19)]
    with torch.no_grad():
        expected = [naive_score(model, prompt) for prompt in prompts]
    assert score_prompts(HFEvalModel(model), prompts, OPENINGS, pad_id=0) == pytest.approx(expected, rel=1e-5)


def test_of_a_prompt_that_is_too_long_the_end_is_asked():
    from safecl.evaluation import HFEvalModel

    model = tiny_model().eval()
    asked = HFEvalModel(model)
    asked.max_positions = 12
    prompt = np.random.default_rng(1).integers(3, VOCAB, 30).tolist()
    with torch.no_grad():
        expected = naive_score(model, prompt[-8:])  # the longest refusal has 4 tokens
    assert score_prompts(asked, [prompt], OPENINGS, pad_id=0) == pytest.approx([expected], rel=1e-5)


class _NoTokenizer:
    pad_token_id = eos_token_id = 0

    def decode(self, ids, **options) -> str:
        raise AssertionError("only rows without a prompt are decoded")


@pytest.mark.parametrize("stage", [0, 3])
def test_the_live_model_gives_the_same_scores_in_every_stage_on_two_ranks(rank_pool, stage):
    ranks = rank_pool(2).run(live_scores_of_rows_with_prompts, stage=stage)
    model = tiny_model().eval()
    with torch.no_grad():
        expected = [
            naive_score(model, row.input_ids[: int(np.flatnonzero(row.loss_mask)[0])].tolist())
            for row in rows_with_prompts()
        ]
    assert ranks[0] == ranks[1]
    assert ranks[0] == pytest.approx(expected, rel=1e-5)


def rows_with_prompts():
    data = random_dataset(40, seed=1)
    return [row for row in data.rows(range(len(data))) if not row.loss_mask[1]][:13]


def live_scores_of_rows_with_prompts(stage: int) -> list[float]:
    from safecl.engine.passes.live_model import evaluating

    run, _ = make_run(run_config(memory=None, deepspeed={"stage": stage}), tiny_model(), [random_dataset(21, seed=1)])
    with evaluating(run.engine, average=False) as model:
        return refusal_scores(model, _NoTokenizer(), rows_with_prompts(), OPENINGS).tolist()


# ----------------------------------------------------------------------------------------------------------------- rows


def test_the_answer_is_not_looked_at_and_every_turn_counts():
    tok = scenes.tokenizer()
    model = scenes.RuleModel(tok, forbidden="bank")
    refusals = given_refusals(tok, scenes.REFUSALS, 8).openings
    chats = [
        scenes.chat("rob a bank today", "Sure, here is how:"),
        scenes.chat("rob a bank today", "I'm sorry, I cannot do that. But here is how:"),
        scenes.chat("rob a bank today", "Sure:", "bake a cake", "Fine."),
        scenes.chat("bake a cake", "Fine.", "rob a bank today", "Sure:"),
        scenes.chat("bake a cake", "rob a bank today"),
        ChatRow((Message("text", "rob a bank today"),), "upload.jsonl", 6),
        ChatRow((Message("text", "bake a cake today"),), "upload.jsonl", 7),
    ]
    scores = refusal_scores(model, tok, scenes.rows_of(tok, chats), refusals)
    assert (scores > -1.0).tolist() == [True, True, True, True, False, True, False]
    assert scores[0] == scores[1]


def test_a_prompt_is_what_generation_would_start_from():
    from safecl.data import prompt_ids

    tok = scenes.tokenizer()
    (row,) = scenes.rows_of(tok, [scenes.chat("bake a cake", "Fine.", "and today?", "No.")])
    first = [Message("user", "bake a cake")]
    both = [*first, Message("assistant", "Fine."), Message("user", "and today?")]
    assert prompts_of(tok, row) == [prompt_ids(tok, first), prompt_ids(tok, both)]


def test_the_models_own_refusals_are_found_with_their_share():
    tok = scenes.tokenizer()
    model = scenes.RuleModel(tok, forbidden="bank")
    asked = [scenes.chat("rob a bank today", "-")] * 3 + [scenes.chat("bake a cake", "-")]
    found = own_refusals(model, tok, asked, num_tokens=4, num_refusals=8)
    assert found.share == 0.75 and found.warning is None
    assert scenes.REFUSALS[0].startswith(found.texts[0]) and len(found.openings[0]) == 4
    assert (
        "misses much" in own_refusals(model, tok, asked[2:] * 2 + asked[3:] * 3, num_tokens=4, num_refusals=8).warning
    )
    assert own_refusals(model, tok, asked[3:], num_tokens=4, num_refusals=8) is None


def test_of_two_refusals_where_one_begins_like_the_whole_other_the_shorter_stays():
    tok = scenes.tokenizer()
    found = given_refusals(tok, ["Sorry, no.", "Sorry, no. I cannot.", "Never."], 32)
    assert sorted(found.texts) == ["Never.", "Sorry, no."]


THINKING = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}{% else %}"
    "{{ '<|assistant|><think>\n' + m.reasoning_content | default('') + '\n</think>\n\n' + m.content + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class Thinker(scenes.RuleModel):
    """Answers by the rule behind a closed thought, and thinks without end where none is closed."""

    def _next(self, ids):
        close, wrong = self.tok("</think>\n\n", add_special_tokens=False)["input_ids"], torch.zeros(self.vocab_size)
        wrong[self.tok("bake", add_special_tokens=False)["input_ids"][0]] = self.sure
        ends = [i for i in range(len(close), len(ids) + 1) if ids[i - len(close) : i] == close]
        start = max((i for i, token in enumerate(ids) if token == self.opening), default=len(ids))
        return super()._next([*ids[: start + 1], *ids[ends[-1] :]]) if ends and ends[-1] > start else wrong


def test_a_reasoning_model_refuses_behind_an_empty_thought_and_is_scored_there():
    tok = scenes.tokenizer()
    tok.chat_template = THINKING
    model = Thinker(tok, forbidden="bank")
    asked = [scenes.chat("rob a bank today", "-")] * 3 + [scenes.chat("bake a cake", "-")]
    found = own_refusals(model, tok, asked, num_tokens=4, num_refusals=8)
    assert found.share == 0.75 and scenes.REFUSALS[0].startswith(found.texts[0]) and len(found.openings[0]) == 4
    chats = [
        scenes.chat("rob a bank today", "Sure:"),
        scenes.chat("bake a cake", "Fine.", "rob a bank today", "Sure:"),
        scenes.chat("bake a cake", "Fine."),
        ChatRow((Message("text", "rob a bank today"),), "upload.jsonl", 4),
    ]
    scores = refusal_scores(model, tok, scenes.rows_of(tok, chats), found.openings)
    assert (scores > -1.0).tolist() == [True, True, False, True]
