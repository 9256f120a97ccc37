"""Odd files that are read as they are meant; those that cannot be are in tests/catalogue/files.py."""

from __future__ import annotations

import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from safecl.data import DataError, read_rows

ROW = json.dumps({"prompt": "a", "completion": "b"})
ODD = {
    "CR only": ("a.csv", "prompt,completion\rq 0,r 0\rq 1,r 1\r"),
    "mixed line ends": ("a.csv", "prompt,completion\r\nq 0,r 0\nq 1,r 1\r\n"),
    "CRLF and LF": ("a.jsonl", '{"prompt": "q 0", "completion": "r 0"}\r\n{"prompt": "q 1", "completion": "r 1"}'),
    "blank lines": ("a.csv", "prompt,completion\n\nq 0,r 0\n\n\nq 1,r 1\n"),
    "spaces in the header": ("a.csv", " prompt , completion\nq 0,r 0\nq 1,r 1\n"),
    "an index": ("a.csv", ",prompt,completion\n0,q 0,r 0\n1,q 1,r 1\n"),
    "a comma at the end": ("a.csv", "prompt,completion,\nq 0,r 0,\nq 1,r 1,\n"),
    "a mark at the start": (
        "a.jsonl",
        '\ufeff{"prompt": "q 0", "completion": "r 0"}\n{"prompt": "q 1", "completion": "r 1"}',
    ),
    "1e400 and Infinity": (
        "a.jsonl",
        '{"prompt": "q 0", "completion": "r 0", "s": 1e400}\n{"prompt": "q 1", "completion": "r 1", "s": Infinity}',
    ),
    "wrapped": ("a.json", '{"rows": [{"prompt": "q 0", "completion": "r 0"}, {"prompt": "q 1", "completion": "r 1"}]}'),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_file_gives_its_rows(tmp_path, name):
    file, content = ODD[name]
    (tmp_path / file).write_bytes(content.encode())
    rows, bad = read_rows(str(tmp_path / file))
    assert [[m.content for m in row.messages] for row in rows] == [["q 0", "r 0"], ["q 1", "r 1"]] and bad.count == 0


@pytest.mark.parametrize("text", ["a\u2028b", "a\x85b", "a\x0cb", "a\x1cb", "\U0001f600", "e\u0301", "\u202eabc"])
def test_characters_that_others_take_for_line_ends_or_change_stay_as_they_are(tmp_path, text):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": text, "completion": text}, ensure_ascii=False), "utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": text, "completion": text}))
    (tmp_path / "c.csv").write_text(f"prompt,completion\n{text},{text}\n", "utf-8", newline="")
    for name in ("a.jsonl", "b.jsonl", "c.csv"):
        assert [m.content for m in read_rows(str(tmp_path / name))[0][0].messages] == [text, text]


def test_numbers_in_a_table_of_text_keep_their_form(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\n3+3,006\n2/3,1e400\n")
    assert [row.messages[1].content for row in read_rows(str(tmp_path / "a.csv"))[0]] == ["006", "1e400"]


def test_a_cell_that_is_too_long_spoils_its_row_alone(tmp_path):
    (tmp_path / "a.csv").write_text(f"prompt,completion\nHi,{'x' * 5_000_000}\nHi,Hello\n")
    rows, bad = read_rows(str(tmp_path / "a.csv"), max_bad_rows=1)
    assert len(rows) == 1 and "a.csv:2: not valid CSV: field larger than" in bad.examples[0]


def parquet(path, table) -> str:
    pyarrow.parquet.write_table(table, path)
    return str(path)


def test_structs_of_parquet_lose_the_nulls_that_arrow_has_filled_in(tmp_path):
    asks, said = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yo"}
    calls = [[{"name": "f", "arguments": {"a": 1}}], [{"name": "g", "arguments": {"b": "x"}}]]
    rows = [{"messages": [asks, {**said, "tool_calls": call}]} for call in calls]
    read, bad = read_rows(parquet(tmp_path / "a.parquet", pyarrow.Table.from_pylist(rows)))
    found = [json.loads(row.messages[1].calls)[0]["function"] for row in read]
    assert found == [call[0] for call in calls] and bad.notes == {}


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ([("prompt", [b"Hi"]), ("completion", [b"x"])], "`prompt` must be text, not binary data"),
        ([("prompt", ["a"]), ("completion", ["b"]), ("completion", ["c"])], "has the column `completion` twice"),
        ([("prompt", ["a"]), ("completion", [3])], "`completion` must be text, not a number"),
        ([("prompt", [["a", "b"]]), ("completion", ["c"])], "`prompt` has a part that is not text"),
        ([("messages", [{"role": ["user"], "content": ["Hi"]}])], "must be a list of messages, not an object"),
        ([("prompt", pyarrow.array([], pyarrow.string()))], "has no rows"),
    ],
)
def test_odd_columns_of_parquet_are_named(tmp_path, columns, says):
    table = pyarrow.Table.from_arrays([pyarrow.array(values) for _, values in columns], [name for name, _ in columns])
    with pytest.raises(DataError, match=says):
        read_rows(parquet(tmp_path / "a.parquet", table))


def test_columns_of_categories_and_dates_are_read(tmp_path):
    import datetime

    prompts = pyarrow.array(["a", "b"]).dictionary_encode()
    table = pyarrow.table({"prompt": prompts, "completion": ["c", "d"], "date": [datetime.date(2020, 1, 1)] * 2})
    rows = read_rows(parquet(tmp_path / "a.parquet", table))[0]
    assert [row.messages[0].content for row in rows] == ["a", "b"]


def test_what_is_no_file_is_told_as_what_it_is(tmp_path):
    os.symlink(tmp_path / "b.jsonl", tmp_path / "a.jsonl")
    os.symlink(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    os.symlink(tmp_path / "nowhere", tmp_path / "c.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.jsonl").write_text(ROW)
    (tmp_path / "mixed" / "b.csv").write_text("prompt,completion\n")
    (tmp_path / "bare.jsonl").mkdir()
    for name, says in {
        "a.jsonl": "is a link that leads to no file",
        "c.jsonl": "is a link that leads to no file",
        "pipe.jsonl": "not a regular file",
        "mixed": "name one of its files: a.jsonl, b.csv",
        "bare.jsonl": "it holds no data files either",
    }.items():
        with pytest.raises(DataError, match=says):
            read_rows(str(tmp_path / name))
