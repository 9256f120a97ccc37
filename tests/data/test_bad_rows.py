"""Malformed input: every case ends as a named and counted row, or as a message about the file; never as a traceback."""

from __future__ import annotations

import json

import pytest

from safecl.data import DataError, read_prompts, read_rows
from safecl.data.messages import MAX_ROW_CHARS

GOOD = json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}).encode()
SECRET = "the-customer-writes-this-" * 20


def messages(*turns, **columns) -> bytes:
    return json.dumps({"messages": [*turns], **columns}).encode()


def turn(role="user", content="Hi", **more) -> dict:
    return {"role": role, "content": content, **more}


ANSWER = turn("assistant", "Hello")

# name: (the bytes of one line, what the reason must say)
LINES: dict[str, tuple[bytes, str]] = {
    "broken JSON": (b'{"messages": [', "not valid JSON"),
    "cut in the middle of a string": (GOOD[:40], "not valid JSON"),
    "trailing comma": (GOOD[:-1] + b",}", "not valid JSON"),
    "single quotes": (b"{'messages': []}", "not valid JSON"),
    "two objects on a line": (GOOD + b" " + GOOD, "not valid JSON"),
    "a word": (b"hello there", "not valid JSON"),
    "a comment": (b"// a comment", "not valid JSON"),
    "a list": (b"[1, 2, 3]", "must be a JSON object"),
    "a number": (b"42", "must be a JSON object"),
    "null": (b"null", "must be a JSON object"),
    "text": (b'"' + SECRET.encode() + b'"', "must be a JSON object"),
    "an empty object": (b"{}", "the row is empty"),
    "a raw NUL": (b'{"messages": "\x00"}', "not valid JSON"),
    "a raw newline sign in a string": (b'{"messages": "a\tb"}', "not valid JSON"),
    "only NULs": (b"\x00\x00\x00", "not valid JSON"),
    "not UTF-8": (b'{"messages": "\xff\xfe"}', "not valid UTF-8"),
    "Latin-1": (GOOD.replace(b"Hello", "Grüße".encode("latin-1")), "not valid UTF-8"),
    "a BOM in the middle of the file": (b"\xef\xbb\xbf" + GOOD, "not valid JSON"),
    "duplicate keys": (b'{"messages": [], "messages": []}', "the key `messages` appears twice"),
    "duplicate keys inside a turn": (
        b'{"messages": [{"role": "user", "role": "user", "content": "a"}]}',
        "the key `role` appears twice",
    ),
    "a duplicate key that is the row": (f'{{"{SECRET}": 1, "{SECRET}": 2}}'.encode(), "appears twice"),
    "nested too deeply": (b'{"a": ' * 100_000, "not "),
    "lists nested too deeply": (b"[" * 100_000, "not "),
    "a number with too many digits": (b'{"messages": ' + b"9" * 5000 + b"}", "not usable JSON"),
    "enormous, 10 MB": (b'{"messages": "' + b"x" * 10_000_000 + b'"}', "enormous"),
    "enormous, 17 MB": (b'{"messages": "' + b"x" * (4 * MAX_ROW_CHARS + 10) + b'"}', "enormous"),
    "enormous in many turns": (messages(*[turn(content="y" * 600_000), ANSWER] * 8), "enormous"),
    "no messages": (b'{"chat": []}', "no `messages`; the row has `chat`"),
    "messages null": (messages()[:-3] + b"null}", "must be a list"),
    "messages a number": (b'{"messages": 3}', "must be a list of messages, not a number"),
    "messages an object": (b'{"messages": {}}', "must be a list of messages, not an object"),
    "messages text": (b'{"messages": "hi"}', "must be a list of messages, not text"),
    "messages empty": (messages(), "`messages` is empty"),
    "a turn that is text": (messages("hi", ANSWER), "must be an object"),
    "a turn that is null": (messages(None, ANSWER), "must be an object"),
    "a turn without role": (messages({"content": "x"}, ANSWER), "messages[0] has no `role`; it has `content`"),
    "a turn without content": (messages({"role": "user"}, ANSWER), "messages[0] has no `content`"),
    "role misspelt": (messages(turn(), turn("asistant")), "unknown role 'asistant'; did you mean `assistant`?"),
    "role in capitals": (messages(turn("USER"), ANSWER), "did you mean `user`?"),
    "role unknown": (messages(turn("narrator"), ANSWER), "known: system, user, assistant"),
    "role enormous": (messages(turn(SECRET), ANSWER), "unknown role"),
    "role a number": (messages(turn(1), ANSWER), "`role` must be text"),
    "role null": (messages(turn(None), ANSWER), "`role` must be text"),
    "role with a lone surrogate": (messages(turn("\ud800"), ANSWER), "unknown role"),
    "misspelt tool": (messages(turn(), turn("tools"), ANSWER), "unknown role 'tools'; did you mean `tool`?"),
    "tool calls": (messages(turn(), turn("assistant", "", tool_calls=[{"id": 1}])), "a call needs the `name`"),
    "a call of the user": (
        messages(turn("user", tool_calls=[{"name": "f"}]), ANSWER),
        "only the assistant calls tools",
    ),
    "content null": (messages(turn(content=None), ANSWER), "content is null"),
    "content a number": (messages(turn(), turn("assistant", 3)), "must be text, not a number"),
    "content true": (messages(turn(), turn("assistant", True)), "must be text, not true or false"),
    "content an object": (messages(turn(content={"text": "x"}), ANSWER), "must be text, not an object"),
    "content an empty list": (messages(turn(content=[]), ANSWER), "is an empty list"),
    "content with an image": (messages(turn(content=[{"type": "image_url", "image_url": SECRET}]), ANSWER), "not text"),
    "content a list of text": (messages(turn(content=[SECRET]), ANSWER), "not text"),
    "user empty": (messages(turn(content=""), ANSWER), "message 1 (user) is empty"),
    "answer empty": (messages(turn(), turn("assistant", "")), "message 2 (assistant) is empty"),
    "answer of spaces": (messages(turn(), turn("assistant", " \n\t")), "message 2 (assistant) is empty"),
    "lone surrogate": (messages(turn(content="\ud800"), ANSWER), "not valid Unicode"),
    "lone low surrogate in the answer": (
        messages(turn(), turn("assistant", "ok \udfff" + SECRET)),
        "not valid Unicode",
    ),
    "NUL in the text": (messages(turn(content="a\0b"), ANSWER), "NUL character"),
    "no assistant turn": (messages(turn()), "no assistant turn"),
    "only a system message": (messages(turn("system", "s")), "no user turn"),
    "no user turn": (messages(ANSWER), "a user turn must come first"),
    "assistant first": (messages(ANSWER, turn(), ANSWER), "a user turn must come first"),
    "system message late": (messages(turn(), turn("system", "s"), ANSWER), "must come first"),
    "nothing to train": (messages(turn(), turn("assistant", "a", train=False)), "nothing to learn"),
    "train is text": (messages(turn(), turn("assistant", "a", train="no")), "`train` must be true or false"),
    "weight is 0.5": (messages(turn(), turn("assistant", "a", weight=0.5)), "`weight` must be 0 or 1"),
    "unmask is text": (messages(turn(), ANSWER, unmask=SECRET), "`unmask` must be true or false"),
}

# format, columns, what the reason must say
COLUMNS: dict[str, tuple[str, dict, str]] = {
    "prompt null": ("prompt_completion", {"prompt": None, "completion": "a"}, "`prompt` is null"),
    "prompt a number": ("prompt_completion", {"prompt": 3, "completion": "a"}, "`prompt` must be text"),
    "completion missing": ("prompt_completion", {"prompt": "p"}, "no `completion`; the row has `prompt`"),
    "completion empty": ("prompt_completion", {"prompt": "p", "completion": ""}, "(assistant) is empty"),
    "completion of the wrong role": (
        "prompt_completion",
        {"prompt": "p", "completion": [turn("user")]},
        "no assistant turn",
    ),
    "prompt an empty list": ("prompt_completion", {"prompt": [], "completion": "a"}, "is an empty list"),
    "instruction missing": ("alpaca", {"input": "i", "output": "o"}, "no `instruction`"),
    "instruction and input empty": ("alpaca", {"instruction": "", "input": "", "output": "o"}, "(user) is empty"),
    "output null": ("alpaca", {"instruction": "i", "output": None}, "`output` is null"),
    "output missing": ("alpaca", {"instruction": "i"}, "no `response`; the row has `instruction`"),
    "input a list": ("alpaca", {"instruction": "i", "input": [1], "output": "o"}, "not text"),
    "history a text": ("alpaca", {"instruction": "i", "output": "o", "history": SECRET}, "`history` must be a list"),
    "history of single turns": (
        "alpaca",
        {"instruction": "i", "output": "o", "history": [["a"]]},
        "`history` must be a list",
    ),
    "history with null": (
        "alpaca",
        {"instruction": "i", "output": "o", "history": [["a", None]]},
        "history[0][1] is null",
    ),
    "system a number": ("alpaca", {"instruction": "i", "output": "o", "system": 3}, "`system` must be text"),
    "sharegpt: unknown speaker": (
        "sharegpt",
        {"conversations": [{"from": "alien", "value": "x"}]},
        "unknown from 'alien'",
    ),
    "sharegpt: other keys": (
        "sharegpt",
        {"conversations": [{"speaker": "human", "text": SECRET}]},
        "has no `from`; it has `speaker`, `text`",
    ),
    "sharegpt: value null": ("sharegpt", {"conversations": [{"from": "human", "value": None}]}, "is null"),
    "text missing": ("text", {"body": "x"}, "no `text`; the row has `body`"),
    "text empty": ("text", {"text": "  "}, "the text is empty"),
    "text a number": ("text", {"text": 1.5}, "`text` must be text, not a number"),
    "text with NUL": ("text", {"text": "\0"}, "NUL"),
}


def check_report(report: str) -> None:
    for line in report.splitlines():
        assert SECRET[:85] not in line, "a message shows more than 80 characters of somebody's row"
        assert line.isprintable(), "a message must not carry control characters to the terminal"


@pytest.mark.parametrize("case", LINES)
def test_a_malformed_line_is_named_and_counted_and_its_neighbours_are_read(tmp_path, case):
    line, says = LINES[case]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([GOOD, line, GOOD, b""]))
    rows, bad = read_rows(str(path), max_bad_rows=1)
    assert [row.line for row in rows] == [1, 3]
    assert (bad.count, bad.seen) == (1, 3)
    assert bad.examples[0].startswith(f"{path}:2: ") and says in bad.examples[0]
    check_report(str(bad).replace(str(path), ""))


@pytest.mark.parametrize("case", COLUMNS)
def test_a_row_with_wrong_columns_is_named_and_counted(tmp_path, case):
    format, columns, says = COLUMNS[case]
    path = tmp_path / "rows.jsonl"
    good = {
        "prompt_completion": {"prompt": "p", "completion": "c"},
        "alpaca": {"instruction": "i", "output": "o"},
        "text": {"text": "t"},
    }
    good["sharegpt"] = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    path.write_text("\n".join(json.dumps(row) for row in (good[format], columns)))
    rows, bad = read_rows(str(path), format=format, max_bad_rows=1)
    assert len(rows) == 1 and bad.count == 1
    assert bad.examples[0].startswith(f"{path}:2: ") and says in bad.examples[0], bad.examples
    check_report(str(bad).replace(str(path), ""))


@pytest.mark.parametrize("case", LINES)
def test_prompts_meet_the_same_lines_without_a_traceback(tmp_path, case):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(LINES[case][0] + b'\n{"prompt": "Hi"}\n')
    prompts = read_prompts(str(path), max_bad_rows=1)
    assert "Hi" in [p.text for p in prompts]


# ------------------------------------------------------------------------------------------------------------ the limit


def file_with(tmp_path, num_good: int, num_bad: int) -> str:
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([GOOD] * num_good + [b"{"] * num_bad))
    return str(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("num_bad", "limit", "stops"),
    [
        (1, 0.01, False),
        (2, 0.01, True),
        (1, 0, True),
        (0, 0, False),
        (5, 5, False),
        (6, 5, True),
        (1, 1, False),
        (2, 1, True),
        (99, 0.99, False),
    ],
)
def test_the_limit_is_a_share_below_one_and_a_count_from_one_on(tmp_path, num_bad, limit, stops):
    path = file_with(tmp_path, 100 - num_bad, num_bad)
    if not stops:
        assert read_rows(path, max_bad_rows=limit)[1].count == num_bad
        return
    with pytest.raises(DataError, match=rf"{num_bad} of 100 rows .*max_bad_rows") as caught:
        read_rows(path, max_bad_rows=limit)
    assert f"rows.jsonl:{101 - num_bad}: not valid JSON" in str(caught.value)


def test_only_the_first_bad_rows_are_listed_and_the_rest_is_counted(tmp_path):
    bad = read_rows(file_with(tmp_path, 50, 40), max_bad_rows=0.9, limit_report=3)[1]
    assert bad.count == 40 and len(bad.examples) == 3 and "and 37 more" in str(bad)


def test_a_file_without_one_good_row_stops_whatever_the_limit(tmp_path):
    with pytest.raises(DataError, match="none of the 3 rows"):
        read_rows(file_with(tmp_path, 0, 3), max_bad_rows=1000)


@pytest.mark.parametrize("content", [b"", b"\n\n \n", b"\xef\xbb\xbf"])
def test_a_file_without_rows_is_a_message(tmp_path, content):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.jsonl: has no rows"):
        read_rows(str(tmp_path / "rows.jsonl"))


def test_random_bytes_never_give_a_traceback(tmp_path):
    import random

    source = random.Random(0)
    for name in ("a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.txt"):
        for _ in range(40):
            whole = bytearray(GOOD + b"\n" + GOOD)
            for _ in range(source.randrange(1, 60)):
                whole[source.randrange(len(whole))] = source.randrange(256)
            (tmp_path / name).write_bytes(whole if source.random() < 0.5 else source.randbytes(source.randrange(200)))
            for read in (lambda p: read_rows(p, max_bad_rows=0.9), read_prompts):
                try:
                    read(str(tmp_path / name))
                except DataError as error:
                    assert name in str(error)
