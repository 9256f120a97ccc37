"""Kinds of memory rows, and shares of the draws that a memory cannot give."""

from __future__ import annotations

import json

import pytest

from safecl.config import ConfigError, MemoryConfig
from safecl.data import prepare_dataset
from safecl.planning.memory_kinds import check_shares, tags_of_memory, tags_of_task_rows
from tests.scan import scenes

REFUSED, ANSWERED = "I'm sorry, but I cannot help with that.", "Add the butter and stir."


@pytest.fixture
def memory(tmp_path):
    """A function of answers, or of (answer, tags), to the rows of a memory with them."""

    def make(*answers):
        given = [answer if isinstance(answer, tuple) else (answer, {}) for answer in answers]
        lines = [scenes.dialogue(f"Question {i}?", text) | tags for i, (text, tags) in enumerate(given)]
        path = tmp_path / "memory.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return prepare_dataset(str(path), tokenizer=scenes.tokenizer(), max_length=200, cache_dir=tmp_path / "cache")

    return make


def settings(**changes) -> MemoryConfig:
    return MemoryConfig.model_validate({"source": "m.jsonl", "balance_by": "kind", **changes})


def test_a_row_without_a_kind_gets_it_from_its_answer_and_a_kind_of_its_own_stays(memory):
    rows = memory(REFUSED, ANSWERED, (ANSWERED, {"kind": "mine"}))
    tags = tags_of_memory(settings(), rows, scenes.tokenizer())
    assert [tags(i)["kind"] for i in range(3)] == ["refusal", "answer", "mine"]
    by_category = tags_of_memory(settings(balance_by="category"), rows, scenes.tokenizer())
    assert by_category(0) == {} and by_category(2) == {"kind": "mine"}
    task = tags_of_task_rows(settings(), rows)
    assert [task(i)["kind"] for i in range(3)] == ["task", "task", "mine"]


def test_shares_of_categories_without_rows_are_told(memory):
    mixed, refusals = memory(REFUSED, ANSWERED), memory(REFUSED, REFUSED)
    check = lambda rows, **shares: check_shares(settings(shares=shares), rows, scenes.tokenizer())  # noqa: E731
    assert check(memory(REFUSED, ANSWERED), refusal=0.25) == [] == check_shares(settings(), mixed, scenes.tokenizer())
    (note,) = check(memory(REFUSED, REFUSED), refusal=0.25)
    assert "m.jsonl has no rows beside refusal (2)" in note and "safecl memory build --benign" in note
    assert len(refusals) == 2
    (note,) = check(memory(REFUSED, ANSWERED), refusal=0.25, other=0.25)
    assert note == "memory.shares: no row of m.jsonl has the kind other"
    with pytest.raises(ConfigError, match=r"no row of m.jsonl has the kind refusals; the rows have: (refusal|answer) "):
        check(memory(REFUSED, ANSWERED), refusals=0.25)
