"""Rows are rewritten before they are tokenised; their ids stay, and memory and measured rows are not touched."""

from __future__ import annotations

import json

import pytest

from safecl.config import ConfigError, validate_tree
from safecl.data.config_rows import prepare_memory, prepare_task
from safecl.demo.model import train_tokenizer

QUESTION, ANSWER = "how is the soup", "the soup is warm and salty today"


@pytest.fixture
def tree(tmp_path, monkeypatch) -> dict:
    monkeypatch.setenv("SAFECL_CACHE", str(tmp_path / "cache"))
    turns = [("user", QUESTION), ("assistant", ANSWER), ("user", "and the bread"), ("assistant", "the bread is old")]
    messages = [{"role": role, "content": text} for role, text in turns]
    (tmp_path / "t.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (tmp_path / "plain.jsonl").write_text(json.dumps({"text": ANSWER}) + "\n")
    return {
        "model": {"path": "unused"},
        "tasks": [{"name": "a", "train": str(tmp_path / "t.jsonl")}],
        "memory": {"source": str(tmp_path / "t.jsonl")},
        "output": str(tmp_path / "run"),
    }


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([QUESTION, ANSWER, "and the bread is old Look ahead: begins"], vocab_size=300)


def prepared(tree: dict, tokenizer, **settings):
    """The text of the first row, its trained text, and the data set."""
    config = validate_tree(tree | {"methods": {"lookahead": settings} if settings else {}}, "run.yaml")
    data, _ = prepare_task(config, config.tasks[0], tokenizer)
    row = data.row(0)
    text, trained = (tokenizer.decode(ids.tolist()) for ids in (row.input_ids, row.input_ids[row.loss_mask]))
    return text, trained, data, config


def test_questions_preview_the_first_tokens_of_their_answers(tree, tokenizer):
    plain, trained, data, _ = prepared(tree, tokenizer)
    text, still_trained, previewed, config = prepared(tree, tokenizer, tokens=2, connector=" begins: ")
    first = [
        tokenizer.decode(tokenizer(a, add_special_tokens=False)["input_ids"][:2]) for a in (ANSWER, "the bread is old")
    ]
    assert f"{QUESTION} begins: {first[0]}" in text and f"and the bread begins: {first[1]}" in text
    assert "begins" not in plain and still_trained == trained
    assert previewed.row_ids.tolist() == data.row_ids.tolist() and previewed.key != data.key
    memory = prepare_memory(config, tokenizer)
    assert "begins" not in tokenizer.decode(memory.row(0).input_ids.tolist())


def test_a_virtual_preview_begins_the_answer_as_well(tree, tokenizer):
    text, trained, _, _ = prepared(tree, tokenizer, form="virtual", preview="Look ahead: ", connector=" ")
    assert f"{QUESTION} Look ahead:" in text and f"Look ahead: {ANSWER}" in trained
    assert trained.count("Look ahead:") == 2


def test_plain_text_has_no_question_to_preview(tree, tokenizer, tmp_path):
    tree["tasks"][0]["train"] = str(tmp_path / "plain.jsonl")
    assert prepared(tree, tokenizer, tokens=3)[0] == prepared(tree, tokenizer)[0]


def test_one_method_rewrites(tree, tmp_path, monkeypatch):
    (tmp_path / "other_rows.py").write_text(
        "from typing import ClassVar\nfrom safecl.config import MethodConfig\nfrom safecl.methods import base\n"
        "class Config(MethodConfig):\n    rewrites: ClassVar[bool] = True\n"
        "class Method(base.Method[Config]):\n    pass\n"
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "other_rows.py").rename(tmp_path / "mine" / "other_rows.py")
    (tmp_path / "mine" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"lookahead and mine.other_rows each rewrite"):
        validate_tree(tree | {"methods": {"lookahead": {}, "mine.other_rows": {}}}, "run.yaml")


# ------------------------------------------------------------------------------------------------- rewritten answers


def answers_of(tree: dict, tmp_path, *rewritten: str | None):
    """A file with these answers to the row's two questions."""
    asked = [(QUESTION, ANSWER), ("and the bread", "the bread is old")]
    lines = [
        {"question": question, "answer": answer, "rewritten": own}
        for (question, answer), own in zip(asked, rewritten, strict=False)
    ]
    path = tmp_path / "rewritten.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = validate_tree(tree | {"methods": {"sdft": {"answers": str(path)}}}, "run.yaml")
    return config, path


def test_rewritten_answers_are_trained_and_the_others_stay(tree, tokenizer, tmp_path):
    plain = prepared(tree, tokenizer)[2]
    config, _ = answers_of(tree, tmp_path, "warm soup", None)
    data, _ = prepare_task(config, config.tasks[0], tokenizer)
    trained = tokenizer.decode(data.row(0).input_ids[data.row(0).loss_mask].tolist())
    assert "warm soup" in trained and "the bread is old" in trained and ANSWER not in trained
    assert data.row_ids.tolist() == plain.row_ids.tolist()
    again, _ = answers_of(tree, tmp_path, "salty soup", None)  # the same path with another content
    data, _ = prepare_task(again, again.tasks[0], tokenizer)
    assert "salty soup" in tokenizer.decode(data.row(0).input_ids.tolist())


def test_answers_of_other_rows_are_refused(tree, tokenizer, tmp_path):
    config, _ = answers_of(tree, tmp_path, "warm soup")
    with pytest.raises(ConfigError, match=r"rewritten.jsonl was written for other rows.*safecl memory rewrite CFG"):
        prepare_task(config, config.tasks[0], tokenizer)


def test_the_missing_file_is_told_with_the_verb_that_writes_it(tree, tmp_path):
    from safecl.commands.preflight import refuse_missing_files

    with pytest.raises(ConfigError, match=r"sdft needs `sdft: {answers: FILE}`; `safecl memory rewrite CFG`"):
        validate_tree(tree | {"methods": {"sdft": {}}}, "run.yaml")
    config = validate_tree(tree | {"methods": {"sdft": {"answers": "nowhere.jsonl"}}}, "run.yaml")
    with pytest.raises(ConfigError, match=r"methods\.sdft\.answers: nowhere\.jsonl: no such file"):
        refuse_missing_files(config)
