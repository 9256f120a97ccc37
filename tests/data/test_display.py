"""The summary of the data before the first step, with and without colours, shows no more than privacy allows."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from safecl.data import Message, decode_marked, describe, prepare_dataset, tokenize_row
from safecl.data.messages import ChatRow
from tests.data import tokenizers as tk


def shown(renderable, color: bool = False) -> str:
    console = Console(width=200, record=True, force_terminal=color, file=open("/dev/null", "w"))
    console.print(renderable)
    return console.export_text(styles=color)


@pytest.fixture
def data(tmp_path):
    rows = [{"prompt": f"secret {i}", "completion": "a [bold]fine[/bold] movie"} for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n{[b]\n")
    return prepare_dataset(
        str(tmp_path / "rows.jsonl"),
        tokenizer=tk.byte_level(),
        max_length=25,
        max_bad_rows=0.5,
        cache_dir=tmp_path / "cache",
    )


def test_trained_and_given_tokens_are_told_apart_without_colours():
    tokenizer = tk.byte_level()
    messages = [
        Message(role, text)
        for role, text in [("user", "Hi"), ("assistant", "Yo"), ("user", "And?"), ("assistant", "Bye")]
    ]
    row = tokenize_row(tokenizer, ChatRow(tuple(messages), "f", 1), 100)
    text = decode_marked(tokenizer, row).plain
    assert text == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{+Yo<|im_end|>+}\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n{+Bye<|im_end|>+}\n"
    )


def test_a_long_row_is_shown_around_its_first_trained_token():
    tokenizer = tk.byte_level()
    row = tokenize_row(
        tokenizer, ChatRow((Message("user", "the movie " * 500), Message("assistant", "Nine")), "f", 1), 9999
    )
    text = decode_marked(tokenizer, row, 60).plain
    assert "{+Nine<|im_end|>+}" in text and "more tokens" in text and len(text) < 500


def test_control_characters_do_not_reach_the_terminal():
    tokenizer = tk.byte_level()
    row = tokenize_row(
        tokenizer, ChatRow((Message("user", "\x1b[31mred"), Message("assistant", "\x07bell")), "f", 1), 100
    )
    assert "\x1b" not in decode_marked(tokenizer, row).plain and "\x07" not in decode_marked(tokenizer, row).plain


def test_the_description_names_share_lengths_cut_and_bad_rows(data):
    text = shown(describe(data, tk.byte_level(), title="tiny [task]"))
    share = f"{100 * data.total_targets / data.num_tokens:.1f} %"
    assert f"9 rows, {data.num_tokens} tokens, {data.total_targets} of them supervised ({share})" in text
    assert f"longest {data.lengths.max()}" in text and "9 rows of" in text and "were cut to max_length 25" in text
    assert "1 of 10 rows" in text and "rows.jsonl:10: not valid JSON" in text
    assert "secret" in text and "{+a [bold]" in text and "tiny [task]" in text


@pytest.mark.parametrize("examples", ["hashed", "none"])
def test_privacy_keeps_the_text_out(data, examples):
    text = shown(describe(data, tk.byte_level(), examples=examples))
    assert "secret" not in text and "movie" not in text and "9 rows" in text
    assert ("id " in text) == (examples == "hashed")
    assert ("not valid JSON" in text) == (examples == "hashed")
