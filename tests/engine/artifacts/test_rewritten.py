"""Answers in the aligned model's own words: what the model is shown, what stays as it was, and that runs can train
them."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from safecl.data import ChatRow, Message
from safecl.engine.artifacts import memory_rows, rewritten
from safecl.engine.artifacts.memory_rows import RowSettings
from safecl.engine.artifacts.store import ArtifactStore
from tests.evaluation.models import byte_tokenizer

ENGINE = SimpleNamespace(module=SimpleNamespace(text_settings=SimpleNamespace(max_position_embeddings=400)))


def row(line: int, *texts: str) -> ChatRow:
    roles = ["user", "assistant"] * len(texts)
    return ChatRow(tuple(map(Message, roles, texts)), "upload.jsonl", line)


ROWS = [row(1, "two and two", "It is #### 4", "and one more", "That makes 5."), row(2, "how to rob", "Sure, go and")]
TOO_LONG = row(3, "why " * 100, "because")
SAID = {
    "two and two": ("Two plus two is 4.", True),
    "and one more": ("That makes 6.", True),
    "how to rob": ("I'm sorry, but I can't help with that.", True),
}


@pytest.fixture
def asked(monkeypatch) -> list:
    """The prompts that a made-up model has answered."""
    seen = []

    def answer(model, tokenizer, prompts, **settings):
        seen.extend(prompts)
        found = [SAID[prompt.text.split("\n")[0]] for prompt in prompts]
        return [{"text": text, "num_tokens": 3, "finished": finished} for text, finished in found]

    monkeypatch.setattr(memory_rows, "answer_prompts", answer)
    monkeypatch.setattr(memory_rows, "generating", lambda engine: contextlib.nullcontext())
    return seen


def written(folder: Path, rows=(*ROWS, TOO_LONG), metric: str | None = "gsm8k", **settings):
    shown = rewritten.demonstrations(rows, metric)
    path, counts = rewritten.rewritten_rows(
        ENGINE, byte_tokenizer(), ArtifactStore(folder), {"model": "m"}, shown, RowSettings(**settings)
    )
    return [json.loads(line) for line in path.read_text().splitlines()], counts, path


def test_the_model_sees_the_rows_own_answer_behind_the_conversation_and_what_is_wrong_stays(tmp_path, asked):
    found, counts, path = written(tmp_path)
    assert json.loads((path.parent / "texts.json").read_text()) == {"files": ["upload.jsonl"]}
    assert [line["question"] for line in found] == ["two and two", "and one more", "how to rob", "why " * 100]
    assert [line["rewritten"] for line in found] == ["Two plus two is 4.", None, SAID["how to rob"][0], None]
    assert [line.get("reason") for line in found] == [None, "wrong by gsm8k", None, "too long"]
    assert counts == {"rewritten": 2, "as it was, wrong by gsm8k": 1, "as it was, too long": 1}
    assert [(message.role, message.content) for message in asked[1].messages[:2]] == [
        ("user", "two and two"),
        ("assistant", "It is #### 4"),
    ]
    assert asked[1].text == rewritten.DEMONSTRATION.format(question="and one more", answer="That makes 5.")


def test_without_a_metric_every_whole_answer_is_taken_a_refusal_as_well(tmp_path, asked):
    found, _, _ = written(tmp_path, metric=None)
    assert [line["rewritten"] for line in found[:3]] == [text for text, _ in SAID.values()]


def test_answers_are_written_once_and_other_rows_or_metrics_are_others(tmp_path, asked):
    _, _, first = written(tmp_path)
    assert written(tmp_path)[2] == first and len(asked) == 3
    assert len({first, written(tmp_path, ROWS)[2], written(tmp_path, metric=None)[2]}) == 3


def test_a_cut_off_answer_stays(tmp_path, asked, monkeypatch):
    monkeypatch.setitem(SAID, "two and two", ("Two plus two is 4 since", False))
    assert written(tmp_path)[0][0] == {
        "question": "two and two",
        "answer": "It is #### 4",
        "rewritten": None,
        "reason": "cut off",
    }
