"""Utility of a model on a task: label accuracy, exact match, GSM8K's final number, or likelihood of the references.

    label_accuracy  argmax over labels y of log p(y | x) = the reference; labels are the distinct answers of the rows
    exact_match     the greedy answer equals the reference (see `scoring.matches`)
    gsm8k           the greedy answer's number equals the reference's, after `####` or as its last number
    rouge_l         mean over rows of the F1 of the longest common subsequence of words (Lin 2004)
    pass@1          the tests of a HumanEval-style problem pass on the greedy answer's code (see `code/`)
    answer_nll      mean over answer tokens of -log p(y_t | x, y_<t), in nats; lower is better;
                    its detail `perplexity` is the exponential of the mean and of its interval's ends

An answer, and a reference, is the text behind a thought. Where a thought does not end there is no answer, and nothing
matches.

Prompts are rendered as in training: with another template than that of its tuning, a model gives other answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from safecl.config import ConfigError, EvalConfig
from safecl.config.data import PASS_AT_1
from safecl.data.messages import ChatRow
from safecl.evaluation.answers.likelihood import Scored, log_likelihoods
from safecl.evaluation.answers.model import EvalModel, gather_in_order, max_positions_of, shard_of
from safecl.evaluation.answers.prompts import Answer, answer_prompts, encode_within, pad_id_of
from safecl.evaluation.answers.texts import place_of, text_of
from safecl.evaluation.answers.thought import answer_of
from safecl.evaluation.code.passing import marks_of, outcomes
from safecl.evaluation.code.problems import without_tests
from safecl.evaluation.code.sandbox import check_sandbox
from safecl.evaluation.records import cut_off_rate, given
from safecl.evaluation.results.task import TaskResult
from safecl.evaluation.scoring.matches import (
    exact_match,
    last_number,
    reference_number,
    relaxed_match,
    rouge_l,
    strict_number,
)
from safecl.evaluation.statistics.intervals import Mean, Rate, rate, token_mean

COMPARED = ("exact_match", "gsm8k", "rouge_l")
"""Metrics that compare generated answers with references."""
GENERATED = (*COMPARED, PASS_AT_1)
"""Metrics of generated answers."""

LARGEST_EXPONENT = 700.0
MAX_LABELS = 64
UNBOUNDED_LENGTH = 1 << 20


def evaluate_task(
    model: EvalModel,
    tokenizer: Any,
    eval: EvalConfig,
    rows: Sequence[ChatRow],
    *,
    name: str = "task",
    batch_size: int = 32,
    max_length: int | None = None,
) -> TaskResult:
    """Measure `eval.metric` on rows from `safecl.data.read_rows`.

    Args: `batch_size`: answers generated together on one rank; `max_length`: most tokens of a row (default: the model's
    positions). Every rank calls it with the same arguments; rank i mod world_size handles row i, and every rank gets
    the same result. Raises: ConfigError where the rows do not fit the metric (no answer to compare with, no number in a
    GSM8K reference, only one label).
    """
    check_rows(eval, tokenizer, rows)
    if eval.metric == "answer_nll":
        return _answer_nll(model, tokenizer, rows, name, max_length)
    if eval.metric == "label_accuracy":
        return _label_accuracy(model, tokenizer, rows, name, max_length)
    return _generated(model, tokenizer, eval, rows, name, batch_size)


def check_rows(eval: EvalConfig, tokenizer: Any, rows: Sequence[ChatRow]) -> None:
    """Raise ConfigError where the rows do not fit the metric."""
    if not rows:
        raise ConfigError(f"{eval.path}: no rows to measure {eval.metric} with")
    if eval.metric == PASS_AT_1:
        check_sandbox()
    if eval.metric in ("answer_nll", PASS_AT_1):
        return
    for row in rows:
        if row.messages[-1].role != "assistant":
            raise ConfigError(
                f"{place_of(row)}: {eval.metric} needs an answer to compare with; use metric: answer_nll for plain text"
            )
        if row.messages[-1].calls is not None:
            raise ConfigError(
                f"{place_of(row)}: {eval.metric} compares text, and the last answer of this row calls a tool; use "
                "metric: answer_nll, or leave the row out"
            )
    if eval.metric == "label_accuracy":
        labels_of(rows)
    if eval.metric == "gsm8k":
        _check_references(tokenizer, rows)


def encode_rows(eval: EvalConfig, tokenizer: Any, rows: Sequence[ChatRow], positions: int | None) -> list[list[int]]:
    """Return the token ids that the metric feeds to a model with this many positions (None: no limit): whole rows, or
    the prompts alone. Raises ConfigError as the measurement itself does."""
    if eval.metric in ("answer_nll", "label_accuracy"):
        from safecl.data import tokenize_row

        return [list(tokenize_row(tokenizer, row, positions or UNBOUNDED_LENGTH).input_ids) for row in rows]
    return encode_within(positions, tokenizer, rows)


# ----------------------------------------------------------------------------------------------------------- likelihood


def _score(model: EvalModel, tokenizer: Any, rows: Sequence[ChatRow], max_length: int | None) -> list[Scored]:
    """Compute the log-likelihood of the supervised tokens of each of this rank's rows."""
    from safecl.data import tokenize_row

    limit = max_length or max_positions_of(model) or UNBOUNDED_LENGTH
    encoded = [tokenize_row(tokenizer, row, limit) for row in rows]
    return log_likelihoods(model, [(row.input_ids, row.loss_mask) for row in encoded], pad_id=pad_id_of(tokenizer))


def _answer_nll(
    model: EvalModel, tokenizer: Any, rows: Sequence[ChatRow], name: str, max_length: int | None
) -> TaskResult:
    scored = gather_in_order(model, _score(model, tokenizer, shard_of(model, rows), max_length))
    if not any(row.num_tokens for row in scored):
        raise ConfigError(
            f"{rows[0].path}: no row has an answer token to score; are the answers cut off by max_length?"
        )
    outputs = [
        {**_base_record(name, number, row), "nll": -result.log_prob, "num_tokens": result.num_tokens}
        for number, (row, result) in enumerate(zip(rows, scored, strict=True))
    ]
    value = token_mean([-row.log_prob for row in scored], [row.num_tokens for row in scored])
    details: dict[str, Rate | Mean] = {"perplexity": _perplexity(value)}
    return TaskResult(name, "answer_nll", value, higher_is_better=False, details=details, outputs=outputs)


def _perplexity(nll: Mean) -> Mean:
    """Return the exponential of a mean and of its interval's ends; infinite where it is larger than a number can be."""
    low, value, high = (math.exp(end) if end < LARGEST_EXPONENT else math.inf for end in (nll.low, nll.value, nll.high))
    return Mean(nll.n, nll.tokens, value, low, high)


def _label_accuracy(
    model: EvalModel, tokenizer: Any, rows: Sequence[ChatRow], name: str, max_length: int | None
) -> TaskResult:
    labels = labels_of(rows)
    own = shard_of(model, rows)
    candidates = [_with_answer(row, label) for row in own for label in labels]
    scored = _score(model, tokenizer, candidates, max_length)
    chosen = []
    for start in range(0, len(scored), len(labels)):
        log_probs = [result.log_prob for result in scored[start : start + len(labels)]]
        chosen.append((labels[log_probs.index(max(log_probs))], log_probs))
    outputs = []
    for number, (row, (label, log_probs)) in enumerate(zip(rows, gather_in_order(model, chosen), strict=True)):
        reference = row.messages[-1].content
        record = {
            **_base_record(name, number, row),
            "answer": label,
            "correct": label == reference,
            "log_probs": log_probs,
        }
        outputs.append(record)
    value = rate(record["correct"] for record in outputs)
    return TaskResult(name, "label_accuracy", value, higher_is_better=True, labels=labels, outputs=outputs)


def labels_of(rows: Sequence[ChatRow]) -> tuple[str, ...]:
    """Return the distinct answers of the rows, sorted. ConfigError for a single one (any model would be right) or more
    than 64."""
    labels = tuple(sorted({row.messages[-1].content for row in rows}))
    if len(labels) < 2:
        raise ConfigError(
            f"{rows[0].path}: label_accuracy needs two labels at least, all {len(rows)} rows used have the same"
        )
    if len(labels) > MAX_LABELS:
        found = f"{len(labels)} distinct answers among {len(rows)} rows are no labels ({MAX_LABELS} at most)"
        raise ConfigError(f"{rows[0].path}: {found}; use metric: exact_match")
    return labels


def _with_answer(row: ChatRow, answer: str) -> ChatRow:
    return replace(row, messages=(*row.messages[:-1], replace(row.messages[-1], content=answer)))


# ----------------------------------------------------------------------------------------------------------- generation


def _generated(
    model: EvalModel, tokenizer: Any, eval: EvalConfig, rows: Sequence[ChatRow], name: str, batch_size: int
) -> TaskResult:
    answers = answer_prompts(model, tokenizer, rows, max_new_tokens=eval.max_new_tokens, batch_size=batch_size)
    every_mark: list[dict[str, bool | float | str]]
    if eval.metric == PASS_AT_1:
        every_mark = [marks_of(outcome) for outcome in outcomes(model, eval, rows, answers)]
        rows = [without_tests(row) for row in rows]
    else:
        every_mark = [_marks(eval.metric, tokenizer, *pair) for pair in zip(rows, answers, strict=True)]
    outputs = [
        {**_base_record(name, number, row), **given(answer), **marks}
        for number, (row, answer, marks) in enumerate(zip(rows, answers, every_mark, strict=True))
    ]
    further = [mark for mark in every_mark[0] if mark not in ("correct", "rouge_l", "outcome")]
    details: dict[str, Rate | Mean] = {mark: rate(record[mark] for record in outputs) for mark in further}
    details["truncated"] = rate(not record["finished"] for record in outputs)
    if (cut_off := cut_off_rate(outputs)) is not None:
        details["cut_off"] = cut_off
    if eval.metric == "rouge_l":
        value: Rate | Mean = token_mean([record["rouge_l"] for record in outputs], [1] * len(outputs))
    else:
        value = rate(record["correct"] for record in outputs)
    return TaskResult(name, eval.metric, value, True, details, outputs=outputs)


def _marks(metric: str, tokenizer: Any, row: ChatRow, answer: Answer) -> dict[str, bool | float | str]:
    """Compare an answer with its reference. Where there is no answer, none is right."""
    marks = _MARKS[metric](answer["text"], answer_of(tokenizer, row.messages[-1].content))
    return {mark: type(value)(False) if answer.get("cut_off") else value for mark, value in marks.items()}


def _match_marks(answer: str, reference: str) -> dict[str, bool | float]:
    return {"correct": exact_match(answer, reference), "relaxed": relaxed_match(answer, reference)}


def _gsm8k_marks(answer: str, reference: str) -> dict[str, bool | float]:
    number = reference_number(reference)
    strict, flexible = strict_number(answer) == number, last_number(answer) == number
    return {"correct": strict or flexible, "strict": strict, "flexible": flexible}


def _rouge_marks(answer: str, reference: str) -> dict[str, bool | float]:
    return {"rouge_l": rouge_l(answer, reference)}


_MARKS = {"exact_match": _match_marks, "gsm8k": _gsm8k_marks, "rouge_l": _rouge_marks}


def _check_references(tokenizer: Any, rows: Sequence[ChatRow]) -> None:
    for row in rows:
        if reference_number(answer_of(tokenizer, row.messages[-1].content)) is None:
            raise ConfigError(f"{place_of(row)}: gsm8k needs a number in the reference answer, `#### 42` at its end")


def _base_record(name: str, number: int, row: ChatRow) -> dict[str, Any]:
    return {
        "id": f"{name}-{number}",
        "set": name,
        "source": place_of(row),
        "tags": dict(row.tags),
        "prompt": text_of(row),
        "reference": row.messages[-1].content,
    }
