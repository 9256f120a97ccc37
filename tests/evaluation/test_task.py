from __future__ import annotations

import json
import math

import pytest
import torch

from safecl.config import ConfigError, EvalConfig
from safecl.data import ChatRow, Message, tokenize_row
from safecl.evaluation import HFEvalModel, evaluate_task, log_likelihoods
from safecl.evaluation.answers import likelihood
from tests.evaluation.models import SIZES, ScriptedModel, byte_tokenizer, random_prompts, tiny_model
from tests.evaluation.test_safety import scripted

QUESTIONS = [
    "great film",
    "dull",
    "a joy from start to end",
    "so long",
    "meh",
    "fine",
    "what a waste of an evening",
    "go see it",
]


def rows_of(pairs, path="eval.jsonl"):
    return [
        ChatRow((Message("user", q), Message("assistant", a)), path, line) for line, (q, a) in enumerate(pairs, start=1)
    ]


def byte_model(tokenizer, seed=0):
    import transformers

    torch.manual_seed(seed)
    sizes = SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    config = transformers.LlamaConfig(**sizes, initializer_range=0.4)
    return transformers.LlamaForCausalLM(config).double().eval()


def oracle_log_prob(model, ids, mask):
    """Sum of log-probabilities in fp64, one row at a time."""
    logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    log_probs = logits - logits.logsumexp(-1, keepdim=True)
    return sum(log_probs[t - 1, ids[t]].item() for t in range(1, len(ids)) if mask[t])


def test_log_likelihoods_equal_an_fp64_oracle_whatever_the_batches(monkeypatch):
    model = tiny_model(seed=5)
    rows = [(ids, [False] + [i % 3 != 0 for i in range(1, len(ids))]) for ids in random_prompts(11, seed=4, shortest=2)]
    oracle = [oracle_log_prob(model.double(), ids, mask) for ids, mask in rows]
    model.float()
    monkeypatch.setattr(likelihood, "TOKENS_AT_ONCE", 3)
    for logits_bytes in (1, 4 * 97 * 30, 2**30):
        got = log_likelihoods(HFEvalModel(model), rows, pad_id=0, logits_bytes=logits_bytes)
        assert [row.num_tokens for row in got] == [sum(mask) for _, mask in rows]
        error = math.dist([row.log_prob for row in got], oracle) / math.hypot(*oracle)
        assert error < 1e-6


def test_answer_nll_is_nats_per_answer_token_with_an_interval_over_rows():
    tokenizer = byte_tokenizer()
    rows = rows_of(
        (q, a)
        for q, a in zip(QUESTIONS, ["yes", "no", "certainly so", "a", "maybe", "it is", "no", "yes"], strict=True)
    )
    model = byte_model(tokenizer)
    encoded = [tokenize_row(tokenizer, row, 256) for row in rows]
    sums = [-oracle_log_prob(model, row.input_ids.tolist(), row.loss_mask.tolist()) for row in encoded]
    counts = [int(row.loss_mask.sum()) for row in encoded]
    result = evaluate_task(HFEvalModel(model.float()), tokenizer, EvalConfig(path="e", metric="answer_nll"), rows)
    assert result.value.value == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    assert result.value.tokens == sum(counts)
    assert result.value.low < result.value.value < result.value.high
    assert not result.higher_is_better


def test_the_label_of_the_highest_likelihood_is_chosen():
    tokenizer = byte_tokenizer()
    labels = ["bad", "good", "so so"]
    model = byte_model(tokenizer, seed=3)
    expected = []
    for question in QUESTIONS:
        scores = []
        for label in labels:
            row = tokenize_row(tokenizer, rows_of([(question, label)])[0], 256)
            scores.append(oracle_log_prob(model, row.input_ids.tolist(), row.loss_mask.tolist()))
        expected.append(labels[scores.index(max(scores))])
    assert len(set(expected)) > 1, "the case must not be one where the same label always wins"
    references = [expected[0], expected[1], expected[2], "bad", "good", "so so", expected[6], expected[7]]
    rows = rows_of(zip(QUESTIONS, references, strict=True))
    result = evaluate_task(HFEvalModel(model.float()), tokenizer, EvalConfig(path="e", metric="label_accuracy"), rows)
    assert [record["answer"] for record in result.outputs] == expected
    assert result.value.hits == sum(a == b for a, b in zip(expected, references, strict=True))
    assert result.labels == ("bad", "good", "so so")


def test_exact_match_ignores_white_space_and_tells_the_relaxed_rate_beside_it():
    tokenizer = byte_tokenizer()
    answers = {"a": " blue\n", "b": "The blue.", "c": "red", "d": "blue and red"}
    rows = rows_of((q, "blue") for q in answers)
    result = evaluate_task(scripted(answers, tokenizer), tokenizer, EvalConfig(path="e", max_new_tokens=40), rows)
    assert [record["correct"] for record in result.outputs] == [True, False, False, False]
    assert (result.value.hits, result.details["relaxed"].hits, result.details["truncated"].hits) == (1, 2, 0)


def test_gsm8k_counts_strict_or_flexible_and_tells_both():
    tokenizer = byte_tokenizer()
    answers = {
        "a": "6 * 3 = 18\n#### 18",
        "b": "so she makes $1,018.00 in all.",
        "c": "#### 18\n\nQuestion: what is 5?",
        "d": "#### 19",
        "e": "no number",
    }
    references = ["#### 18", "x\n#### 1,018", "#### 18", "#### 18", "#### 18"]
    rows = rows_of(zip(answers, references, strict=True))
    config = EvalConfig(path="e", metric="gsm8k", max_new_tokens=60)
    result = evaluate_task(scripted(answers, tokenizer), tokenizer, config, rows)
    assert [record["correct"] for record in result.outputs] == [True, True, True, False, False]
    assert (result.details["strict"].hits, result.details["flexible"].hits) == (2, 2)


def test_answers_cut_off_at_max_new_tokens_are_told():
    tokenizer = byte_tokenizer()
    result = evaluate_task(
        scripted({"a": "blue" * 9}, tokenizer),
        tokenizer,
        EvalConfig(path="e", max_new_tokens=4),
        rows_of([("a", "blue")]),
    )
    assert result.details["truncated"].hits == 1


@pytest.mark.parametrize(
    ("metric", "pairs", "message"),
    [
        ("label_accuracy", [("a", "x"), ("b", "x")], "needs two labels"),
        ("label_accuracy", [(str(i), str(i)) for i in range(70)], "70 distinct answers.*exact_match"),
        ("gsm8k", [("a", "#### 3"), ("b", "none")], r"eval.jsonl:2: gsm8k needs a number"),
        ("exact_match", [], "no rows"),
    ],
)
def test_rows_that_do_not_fit_the_metric_are_refused(metric, pairs, message):
    with pytest.raises(ConfigError, match=message):
        evaluate_task(ScriptedModel({}, 99), byte_tokenizer(), EvalConfig(path="e", metric=metric), rows_of(pairs))


def test_plain_text_rows_have_a_likelihood_and_nothing_to_match():
    tokenizer = byte_tokenizer()
    rows = [
        ChatRow((Message("text", "once upon a time"),), "book.txt", 1),
        ChatRow((Message("text", "the end"),), "book.txt", 2),
    ]
    model = HFEvalModel(byte_model(tokenizer).float())
    assert evaluate_task(model, tokenizer, EvalConfig(path="e", metric="answer_nll"), rows).value.tokens > 10
    with pytest.raises(ConfigError, match=r"book.txt:1: exact_match needs an answer"):
        evaluate_task(model, tokenizer, EvalConfig(path="e"), rows)


def test_rouge_l_is_the_mean_of_the_rows_with_an_interval_over_rows():
    tokenizer = byte_tokenizer()
    rows = rows_of(zip(QUESTIONS[:4], ["a b", "c", "d e f", "g"], strict=True))
    result = evaluate_task(
        HFEvalModel(byte_model(tokenizer).float()), tokenizer, EvalConfig(path="e", metric="rouge_l"), rows
    )
    scores = [record["rouge_l"] for record in result.outputs]
    assert result.value.value == pytest.approx(sum(scores) / 4) and result.value.n == 4 and result.higher_is_better
    assert list(result.details) == ["truncated"] and json.loads(json.dumps(result.to_dict()))["metric"] == "rouge_l"
