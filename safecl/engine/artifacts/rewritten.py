"""Answers of the tasks' rows in the aligned model's own words, for the methods that train them.

The model gets the conversation up to the question, with the row's own answer as an example, and answers greedily. An
answer stays as it was where the model's is cut off, incoherent, or wrong by the task's metric, and where the question
leaves no room for one.

    rewritten/<key>/
        answers.jsonl      every answer of the model, in the order of the questions; a stopped build resumes after it
        rows.jsonl         question, answer, rewritten (null: stays) and, where it stays, the reason
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safecl.data import ChatRow, Prompt
from safecl.data.templates.thinking import answer_prompt_ids
from safecl.distributed import collectives
from safecl.engine.artifacts.memory_rows import RowSettings, answered, fingerprint_of, not_usable, splitting_of
from safecl.engine.artifacts.store import ArtifactStore, Key, obtain
from safecl.engine.passes.forward_engine import ForwardEngine
from safecl.evaluation.answers.prompts import Answer
from safecl.evaluation.scoring.keywords import BROKEN
from safecl.evaluation.scoring.matches import exact_match, last_number, reference_number
from safecl.storage.durable import replace_file

KIND, ROWS, ANSWERS, NO_ROOM = "rewritten", "rows.jsonl", "answers.jsonl", "too long"
DEMONSTRATION = (
    "{question}\n\nThis is an example of a response to the question:\n{answer}\n\n"
    "Now answer with a response of your own."
)
AGREE: dict[str, Callable[[str, str], bool]] = {
    "exact_match": exact_match,
    "gsm8k": lambda answer, reference: last_number(answer) == reference_number(reference),
}
"""Metrics by which a rewritten answer must agree with the row's own."""


@dataclass(frozen=True)
class Demonstration:
    """A question with an answer that is trained, as the model sees both."""

    prompt: Prompt
    question: str
    answer: str
    metric: str | None
    """The metric of the row's task."""


def demonstrations(rows: Sequence[ChatRow], metric: str | None) -> list[Demonstration]:
    """Return every answer of these rows that is trained and follows a question."""
    found = []
    for row in rows:
        for place in range(1, len(row.messages)):
            asked, given = row.messages[place - 1], row.messages[place]
            if asked.role == "user" and given.role == "assistant" and given.is_trained:
                shown = DEMONSTRATION.format(question=asked.content, answer=given.content)
                turns = (*row.messages[: place - 1], replace(asked, content=shown))
                found.append(Demonstration(Prompt(turns, row.path, row.line), asked.content, given.content, metric))
    return found


def rewritten_rows(
    engine: ForwardEngine,
    tokenizer: Any,
    store: ArtifactStore,
    base: Key,
    shown: Sequence[Demonstration],
    settings: RowSettings,
    note: Callable[[str], None] = lambda message: None,
) -> tuple[Path, Counter[str]]:
    """Return the file of the rewritten answers, from the store or written by the model, and how many there are by what
    became of them. A collective call. `base` is what `base_key` returned."""
    prompts = [one.prompt for one in shown]
    key = {**base, **asdict(settings), "prompts": fingerprint_of(prompts), "metrics": ", ".join(_metrics(shown))}
    del key["batch_size"], key["scorer"]
    key |= splitting_of(tokenizer)

    def build(folder: Path) -> None:
        asked = [one for one in shown if _has_room(engine, tokenizer, one.prompt)]
        given = answered(engine, tokenizer, folder / ANSWERS, [one.prompt for one in asked], settings, note, KIND)
        answers = {id(one): answer for one, answer in zip(asked, given, strict=True)}
        lines = "".join(_line(one, answers.get(id(one))) for one in shown)
        collectives.on_first_rank(lambda: replace_file(folder / ROWS, lines))

    path = obtain(store, KIND, key, texts={prompt.path for prompt in prompts}, note=note, build=build) / ROWS
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return path, Counter(f"as it was, {row['reason']}" if row["rewritten"] is None else "rewritten" for row in rows)


def _metrics(shown: Sequence[Demonstration]) -> list[str]:
    return sorted({one.metric for one in shown if one.metric is not None and one.metric in AGREE})


def _has_room(engine: ForwardEngine, tokenizer: Any, prompt: Prompt) -> bool:
    positions = getattr(engine.module.text_settings, "max_position_embeddings", None)
    return positions is None or len(answer_prompt_ids(tokenizer, prompt.messages)) < positions


def _line(one: Demonstration, answer: Answer | None) -> str:
    """The line of one answer in the file. answer: the model's; None where it was not asked."""
    row: dict[str, Any] = {"question": one.question, "answer": one.answer}
    reason = NO_ROOM if answer is None else not_usable(answer, BROKEN) or _disagrees(one, answer["text"])
    if answer is None or reason is not None:
        row |= {"rewritten": None, "reason": reason}
    else:
        row["rewritten"] = answer["text"]
    return json.dumps(row, ensure_ascii=False) + "\n"


def _disagrees(one: Demonstration, answer: str) -> str | None:
    agree = AGREE.get(one.metric or "")
    return None if agree is None or agree(answer, one.answer) else f"wrong by {one.metric}"
