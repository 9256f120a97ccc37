"""Rows that cannot be used."""

from __future__ import annotations

import json

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

# format: a row that is good
GOOD_COLUMNS = {
    "prompt_completion": {"prompt": "p", "completion": "c"},
    "alpaca": {"instruction": "i", "output": "o"},
    "text": {"text": "t"},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
}
