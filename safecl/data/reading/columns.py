"""Columns beside the turns: the mark of answers that are not wanted, and columns that are not used.

KTO sets hold wanted and unwanted answers, and tell them apart by `label`. Only the wanted ones are trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safecl.data.messages import Message, RowProblem, clip
from safecl.data.reading.cells import is_empty, texts_in
from safecl.data.reading.formats import ANSWERS
from safecl.data.reading.turns import THOUGHTS

_TURN_KEYS = {
    "role",
    "content",
    "from",
    "value",
    "train",
    "weight",
    "unmask",
    "tool_calls",
    "function_call",
    "tool_call_id",
    *THOUGHTS,
}
_UNWANTED = ("label", "kto_tag")
_MARKS = {"true": True, "false": False}
_USED = {
    "messages": {"messages", "unmask"},
    "sharegpt": {"conversations"},
    "prompt_completion": {"prompt", "history"},
    "alpaca": {"instruction", "history"},
    "text": {"text"},
}
# A short value in another column is an id or a category, and is kept as the row's tag.
_MEANT_TO_BE_READ = {
    "system", "system_prompt", "input", "context", "history", "tools", "functions", "documents", "tool_calls",
    "messages", "conversations", "text", "instruction", "prompt", "question", "query", "passage", "knowledge",
    "output", "chosen", "rejected", "label", "kto_tag", "thought", *ANSWERS, *THOUGHTS,
}  # fmt: skip
_ASKED = {
    "system",
    "system_prompt",
    "input",
    "context",
    "question",
    "query",
    "passage",
    "knowledge",
}  # not the answer's
_MAX_TAG_CHARS = 80


def is_unwanted(row: Mapping[str, Any], format: str) -> bool:
    """Whether the row marks its answer as one that is not wanted, by `label: false` or `kto_tag: false`.

    Raises: RowProblem where the mark is a 0, which may be a class as well.
    """
    if format in ("text", "fields"):
        return False
    marks = {name: _mark(row.get(name)) for name in _UNWANTED}
    if False in marks.values():
        return True
    name = next((name for name in _UNWANTED if str(row.get(name)).strip() in ("0", "0.0")), None)
    if format == "prompt_completion" and name is not None:
        raise RowProblem(
            f"`{name}` is 0: write false if the answer is not wanted, and rename the column if it is a class"
        )
    return False


def _mark(value: Any) -> bool | None:
    return value if isinstance(value, bool) else _MARKS.get(value.strip().lower()) if isinstance(value, str) else None


def unused_columns(row: Mapping[str, Any], messages: Sequence[Message], format: str) -> list[str]:
    """Name the columns of a row, and the keys of its turns, whose text is in none of its messages."""
    if format == "fields":  # the templates say which columns are meant
        return []
    said = "\0".join(
        text for m in messages for text in (m.content, m.thought or "", m.tools or "", m.calls or "", m.tool or "")
    )
    answer = next((name for name in ANSWERS if name in row), "") if format == "prompt_completion" else ""
    rest = {name: value for name, value in row.items() if name not in _USED[format] and name != answer}
    asked = "\0".join(m.content for m in messages if m.role != "assistant")
    names = [
        f"`{clip(name, 24)}`"
        for name, value in rest.items()
        if _says_more(name, value, asked if name in _ASKED else said, format)
    ]
    turns = row.get({"messages": "messages", "sharegpt": "conversations"}.get(format, ""))
    said_apart = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    extra = dict.fromkeys(key for turn in said_apart for key in turn if _is_extra(turn, key))
    return names + [f"`{clip(key, 24)}` of a turn" for key in extra]


def _is_extra(turn: Mapping[str, Any], key: str) -> bool:
    of_a_tool = key == "name" and str(turn.get("role", turn.get("from"))) not in ("system", "user", "assistant")
    return key not in _TURN_KEYS and not is_empty(turn[key]) and not of_a_tool


def _says_more(name: str, value: Any, said: str, format: str) -> bool:
    if is_empty(value) or (name in _UNWANTED and _mark(value) is not None) or (name == "tools" and format != "text"):
        return False
    if name not in _MEANT_TO_BE_READ and not isinstance(value, (list, dict)) and len(str(value)) <= _MAX_TAG_CHARS:
        return False
    texts = texts_in(value) if isinstance(value, (str, list, dict)) else [str(value)]
    return not texts or any(text.strip() not in said for text in texts)
