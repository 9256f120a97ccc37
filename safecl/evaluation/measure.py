"""Measures a model at one moment: its safety and its utility on each task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from safecl.config import EvalConfig, SafetyConfig
from safecl.data.messages import ChatRow
from safecl.data.reading.rows import Prompt
from safecl.evaluation.answers.model import EvalModel
from safecl.evaluation.answers.thought import answer_of, open_alike
from safecl.evaluation.records import plain_records
from safecl.evaluation.results.moment import Evaluation
from safecl.evaluation.results.safety import SafetyResult
from safecl.evaluation.results.task import TaskResult
from safecl.evaluation.safety import evaluate_safety
from safecl.evaluation.task import COMPARED, MAX_LABELS, evaluate_task

_MAX_LABEL_WORDS = 4


def evaluate(
    model: EvalModel,
    tokenizer: Any,
    *,
    when: str,
    step: int = 0,
    safety: SafetyConfig | None = None,
    prompts: Sequence[Prompt] = (),
    benign: Sequence[Prompt] = (),
    tasks: Sequence[tuple[str, EvalConfig, Sequence[ChatRow]]] = (),
) -> Evaluation:
    """Measure safety (where there are prompts) and each task, given as (name, settings, rows). Every rank calls it with
    the same arguments.

    Short answers that a task teaches ("positive") count as off-task among the answers to disallowed prompts.
    """
    answer = partial(answer_of, tokenizer)
    labels = sorted({label for _, _, rows in tasks for label in short_answers(rows, answer)})
    batch_size = safety.batch_size if safety else 32
    safe = evaluate_safety(model, tokenizer, safety, prompts, benign, labels=labels) if safety and prompts else None
    results = {
        name: evaluate_task(model, tokenizer, config, rows, name=name, batch_size=batch_size)
        for name, config, rows in tasks
    }
    return Evaluation(when, step, safe, results, _warnings(safe, results, answer))


def _warnings(
    safety: SafetyResult | None, tasks: Mapping[str, TaskResult], answer: Callable[[str], str]
) -> tuple[str, ...]:
    """Warn where the scorers do not fit the answers, or almost all answers open with the same word or mark, which no
    reference has."""
    asked = {f"task {name}": result.outputs for name, result in tasks.items() if result.metric in COMPARED}
    found = list(safety.notes) if safety else []
    for what, records in (asked | ({"safety": plain_records(safety.outputs)} if safety else {})).items():
        references = [answer(record["reference"]) for record in records if "reference" in record]
        if count := open_alike([record["answer"] for record in records], references):
            shared = ", which no reference has" if references else ""
            found.append(
                f"{what}: {count} of {len(records)} answers open with the same word or mark{shared}; perhaps it is "
                "part of a header or a thought, and is scored with the answer: look at outputs/, set model.thinking"
            )
    return tuple(found)


def short_answers(rows: Sequence[ChatRow], answer: Callable[[str], str] = str) -> set[str]:
    """Return the distinct answers of rows if they look like labels: few of them, of at most four words.

    answer: takes the answer out of the text of a reference.
    """
    answers = {answer(row.messages[-1].content) for row in rows if row.messages[-1].role == "assistant"}
    few = len(answers) <= min(MAX_LABELS, max(2, len(rows) // 4))
    return answers if few and all(len(answer.split()) <= _MAX_LABEL_WORDS for answer in answers) else set()
