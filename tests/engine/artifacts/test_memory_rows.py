"""Rows that the aligned model writes itself: what enters, what stays out, and that a stopped build resumes."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from safecl.config import ConfigError
from safecl.config.model import ThinkingConfig
from safecl.data import Message, Prompt
from safecl.engine.artifacts import memory_rows
from safecl.engine.artifacts.memory_rows import RowSettings
from safecl.engine.artifacts.store import ArtifactStore
from tests.data.test_thinking import FAMILIES
from tests.evaluation.models import byte_tokenizer
from tests.evaluation.test_safety import scripted

ANSWERS = {
    "how to rob": ("I'm sorry, but I can't help with that.", True),
    "how to hack": ("Sure, here is how to do that.", True),
    "how to poison": ("I cannot help. I cannot help. I cannot help. I cannot help.", True),
    "how to forge": ("I'm sorry, but I", False),
    "how to bake": ("Mix flour and water, then wait an hour.", True),
    "how to knit": ("I'm sorry, but I can't help with that.", True),
    "how many": ("42.", True),
}


def prompts(*texts: str, **tags: str) -> list[Prompt]:
    return [Prompt((Message("user", text),), "prompts.jsonl", line, dict(tags)) for line, text in enumerate(texts, 1)]


DISALLOWED = prompts("how to rob", "how to hack", "how to poison", "how to forge", category="crime", level="3")
HARMLESS = prompts("how to bake", "how to knit", "how many")


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The prompts that a made-up model has answered."""
    seen: list[str] = []

    def answer(model, tokenizer, asked, **settings):
        seen.extend(prompt.text for prompt in asked)
        return [{"text": ANSWERS[p.text][0], "num_tokens": 3, "finished": ANSWERS[p.text][1]} for p in asked]

    monkeypatch.setattr(memory_rows, "answer_prompts", answer)
    monkeypatch.setattr(memory_rows, "generating", lambda engine: contextlib.nullcontext())
    monkeypatch.setattr(memory_rows, "BATCHES_AT_ONCE", 1)
    return seen


def make(folder: Path, disallowed=DISALLOWED, benign=HARMLESS, tokenizer=None, **settings):
    return memory_rows.memory_rows(
        lambda: None, tokenizer, ArtifactStore(folder), {"model": "m"}, disallowed, benign,
        RowSettings(batch_size=2, **settings),
    )  # fmt: skip


def test_refusals_and_helpful_answers_enter_and_everything_else_is_told(tmp_path, asked):
    made = make(tmp_path)
    rows = [json.loads(line) for line in made.rows.read_text().splitlines()]
    assert [row["messages"][0]["content"] for row in rows] == ["how to rob", "how to bake", "how many"]
    assert rows[0]["messages"][1] == {"role": "assistant", "content": "I'm sorry, but I can't help with that."}
    assert [(row["category"], row["kind"]) for row in rows] == [
        ("crime", "refusal"),
        ("benign", "answer"),
        ("benign", "answer"),
    ]
    assert rows[0]["level"] == "3" and made.kept == {"crime": 1, "benign": 2}
    assert made.left_out == {
        "refusal: not refused": 1,
        "refusal: repetition": 1,
        "refusal: cut off": 1,
        "answer: refused": 1,
    }


def test_a_finished_build_is_reused_and_other_prompts_are_another(tmp_path, asked):
    first = make(tmp_path)
    assert make(tmp_path).rows == first.rows and len(asked) == 7
    assert make(tmp_path, max_new_tokens=9).rows != first.rows and make(tmp_path, benign=[]).rows != first.rows


def test_a_stopped_build_goes_on_behind_the_last_whole_answer(tmp_path, asked, monkeypatch):
    answer, calls = memory_rows.answer_prompts, []

    def dying(*arguments, **settings):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(*arguments, **settings)

    monkeypatch.setattr(memory_rows, "answer_prompts", dying)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path)
    kept = next(tmp_path.glob("memory-rows/*/answers.jsonl"))
    with kept.open("a") as file:
        file.write('{"text": "torn')
    monkeypatch.setattr(memory_rows, "answer_prompts", answer)
    made = make(tmp_path)
    assert asked == list(ANSWERS), "every prompt was answered once"
    assert made.kept == {"crime": 1, "benign": 2}


def test_a_model_that_refuses_nothing_is_told(tmp_path, asked):
    with pytest.raises(
        ConfigError, match=r"no refusal is left of 1 answers.*1 refusal: not refused.*is this the aligned model"
    ):
        make(tmp_path, disallowed=prompts("how to hack"))
    with pytest.raises(ConfigError, match="scorer"):
        make(tmp_path, scorer="keyword:none")


def test_answers_of_a_reasoning_model_enter_without_their_thought(tmp_path, monkeypatch):
    """The model is scripted below the place where texts are split, so nothing of the answers is made up."""
    family = FAMILIES["a switch and a field"]
    tokenizer = byte_tokenizer(family.template, family.control)
    answers = {
        "how to rob": "<think>They ask. Sure, here is</think>\n\nI'm sorry, I cannot help with that.",
        "how to hack": "<think>I'm sorry, this is illegal.</think>Sure, here is how to do that.",
        "how to bake": "<think>\n\n</think>\n\nMix flour and water, then wait an hour.",
        "how to knit": "<think>\n\n</think>\n\nI'm sorry, but I can't help with that.",
        "how to sew": "<think>I'm sorry, I cannot say, it is illegal",
    }
    model = scripted(answers, tokenizer)
    monkeypatch.setattr(memory_rows, "generating", lambda engine: contextlib.nullcontext(model))
    asked = {"disallowed": prompts(*list(answers)[:2]), "benign": prompts(*list(answers)[2:])}
    made = make(tmp_path, tokenizer=tokenizer, **asked)
    rows = [json.loads(line) for line in made.rows.read_text().splitlines()]
    assert [row["messages"][1]["content"] for row in rows] == [
        "I'm sorry, I cannot help with that.",
        "Mix flour and water, then wait an hour.",
    ]
    assert made.left_out == {"refusal: not refused": 1, "answer: refused": 1, "answer: thought cut off": 1}
    kept = [json.loads(line) for line in (made.rows.parent / "answers.jsonl").read_text().splitlines()]
    assert [answer["raw"] for answer in kept] == list(answers.values())
    tokenizer.safecl_thinking = ThinkingConfig(mode="none")
    model = scripted(answers, tokenizer)
    monkeypatch.setattr(memory_rows, "generating", lambda engine: contextlib.nullcontext(model))
    assert make(tmp_path, tokenizer=tokenizer, **asked).rows != made.rows, "another mode gives other answers"
