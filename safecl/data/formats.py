"""Converts the columns of one row to messages. The format is detected from the columns, or named in the config.

messages           {"messages": [{"role": "user", "content": "..."}, ...]}
                   of OpenAI; `train` or `weight` per message
prompt_completion  {"prompt": "..." or [messages], "completion" | "answer" | "response": the same, "system", "history"}
                   of TRL and TRACE
alpaca             {"instruction", "input" | "context", "output" | "response", "system", "history"}
                   of Stanford Alpaca and Dolly
sharegpt           {"conversations": [{"from": "human", "value": "..."}, ...]}
text               {"text": "..."}; every token is trained
fields             templates over the row's own columns, for anything else

A turn's thought, in `reasoning_content`, `thinking` or `reasoning`, and the row's `tools` go to the chat template. A
list of messages may stand in its cell as JSON text.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from safecl.config import ConfigError
from safecl.data.cells import is_empty, parse_text, turns_in

MAX_ROW_CHARS = 4 * 2**20  # about a million tokens: more than any context window, so the file must be broken
ROLES = ("system", "user", "assistant")
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
}
ANSWERS = ("completion", "answer", "response")
THOUGHTS = ("reasoning_content", "thinking", "reasoning")


class DataError(ConfigError):
    """Data that cannot be used. The message names the file and the line, and what would work. Exit code 2."""


class RowProblem(Exception):
    """The reason why one row cannot be used. It becomes a counted line in the report of bad rows."""


@dataclass(frozen=True)
class Message:
    """One turn. `train`: what the data says, or None for the default, by which assistant turns are trained.

    thought: what the assistant thinks before its answer, for the chat template to write. tools: JSON list of the
    functions that a conversation may call, on its first turn.
    """

    role: str
    content: str
    train: bool | None = None
    thought: str | None = None
    tools: str | None = None

    @property
    def is_trained(self) -> bool:
        return self.role in ("assistant", "text") if self.train is None else self.train


@dataclass(frozen=True)
class ChatRow:
    """One row in the common form. A `text` row has one message of role "text". `line` counts from 1."""

    messages: tuple[Message, ...]
    path: str
    line: int
    tags: dict[str, str] = field(default_factory=dict)


def clip(value: Any, limit: int = 40) -> str:
    """Shorten a value to `limit` printable characters for a message: a customer's row must not fill the log."""
    if isinstance(value, str):
        shown = "".join(c if c.isprintable() else "?" for c in value[: limit + 1])
    else:
        shown = ascii(value)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def columns_of(columns: Iterable[str]) -> str:
    """List column names for a message, in at most 80 characters."""
    names = ", ".join(f"`{clip(name, 24)}`" for name in list(columns)[:8])
    return clip(names, 80) if names else "no columns"


# --------------------------------------------------------------------------------------------------------------- checks


def _text(value: Any, name: str) -> str:
    if value is None:
        raise RowProblem(f"{name} is null")
    if isinstance(value, list):
        return _joined_parts(value, name)
    if not isinstance(value, str):
        raise RowProblem(f"{name} must be text, not {kind_of(value)}")
    return value


def _joined_parts(parts: list[Any], name: str) -> str:
    if not parts:
        raise RowProblem(f"{name} is an empty list")
    for part in parts:
        if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            raise RowProblem(f"{name} has a part that is not text; images, audio and tool results are not supported")
    return "".join(part["text"] for part in parts)


def kind_of(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    kinds = {int: "a number", float: "a number", dict: "an object", list: "a list", str: "text", type(None): "null"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _check_text(text: str, name: str) -> None:
    if "\0" in text:
        raise RowProblem(f"{name} holds a NUL character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RowProblem(f"{name} is not valid Unicode (a lone surrogate, or bytes that are not UTF-8)") from None


def check_messages(messages: list[Message]) -> tuple[Message, ...]:
    """Check the rules for rows of every format, and drop empty system messages. Raises RowProblem."""
    messages = [m for m in messages if m.role != "system" or m.content.strip()]
    if not messages:
        raise RowProblem("the row is empty")
    if sum(len(m.content) for m in messages) > MAX_ROW_CHARS:
        raise RowProblem(f"the row is enormous (over {MAX_ROW_CHARS // 2**20} million characters)")
    for number, message in enumerate(messages, 1):
        name = "the text" if message.role == "text" else f"message {number} ({message.role})"
        _check_text(message.content, name)
        if not message.content.strip():
            raise RowProblem(f"{name} is empty")
    if messages[0].role != "text":
        _check_turns(messages)
    return tuple(messages)


def _check_turns(messages: list[Message]) -> None:
    roles = [m.role for m in messages]
    if "system" in roles[1:]:
        raise RowProblem("a system message comes after the first turn; it must come first")
    turns = [role for role in roles if role != "system"]
    if not turns or turns[0] != "user":
        raise RowProblem(
            f"the first turn is the {turns[0]}'s; a user turn must come first" if turns else "there is no user turn"
        )
    if "assistant" not in turns:
        raise RowProblem("there is no assistant turn, so nothing to learn")
    if not any(m.is_trained for m in messages):
        raise RowProblem("every message says `train: false`, so nothing to learn")


# ------------------------------------------------------------------------------------------------------------- messages


def _train_flag(turn: Mapping[str, Any], name: str) -> bool | None:
    for key in ("train", "weight", "unmask"):
        value = turn.get(key)
        if value is None or (key == "unmask" and value is False):
            continue
        if isinstance(value, bool) or (key == "weight" and value in (0, 1)):
            return bool(value)
        raise RowProblem(f"{name}: `{key}` must be {'0 or 1' if key == 'weight' else 'true or false'}")
    return None


def read_turns(value: Any, name: str, role_key: str = "role", text_key: str = "content") -> list[Message]:
    """Convert a list of turns to messages. Only their shape is checked. Raises RowProblem."""
    if isinstance(value, str):  # CSV and Parquet often hold the list as text
        try:
            value = parse_text(value)
        except ValueError:
            raise RowProblem(f"`{name}` must be a list of messages, not text") from None
    if not isinstance(value, list):
        raise RowProblem(f"`{name}` must be a list of messages, not {kind_of(value)}")
    if not value:
        raise RowProblem(f"`{name}` is empty")
    return [_turn(turn, f"{name}[{i}]", role_key, text_key) for i, turn in enumerate(value)]


def _turn(turn: Any, name: str, role_key: str, text_key: str) -> Message:
    if not isinstance(turn, dict):
        raise RowProblem(f"{name} must be an object with `{role_key}` and `{text_key}`, not {kind_of(turn)}")
    if turn.get("tool_calls") or turn.get("function_call"):
        raise RowProblem(f"{name} calls a tool; tool calls are not supported")
    for key in (role_key, text_key):
        if key not in turn:
            raise RowProblem(f"{name} has no `{key}`; it has {columns_of(turn)}")
    role = turn[role_key]
    if not isinstance(role, str):
        raise RowProblem(f"{name}: `{role_key}` must be text, not {kind_of(role)}")
    content = _text(turn[text_key], f"{name}.{text_key}")
    return Message(_role(role, name, role_key), content, _train_flag(turn, name), _thought(turn, name, content))


def _thought(holder: Mapping[str, Any], name: str, answer: str) -> str | None:
    """The thought in a field of a turn, or in a column beside an answer; None where the answer holds it."""
    for key in THOUGHTS:
        if not is_empty(holder.get(key)):
            thought = _text(holder[key], f"{name}.{key}" if name else f"`{key}`")
            _check_text(thought, f"`{key}`")
            begins_with_it = answer.lstrip()[:1] in ("<", "[", "◁") and thought.strip() in answer
            return None if begins_with_it else thought
    return None


def _role(role: str, name: str, role_key: str) -> str:
    if role == "developer":  # OpenAI's newer name
        return "system"
    known = _SPEAKERS if role_key == "from" else {r: r for r in ROLES}
    if role not in known:
        near = difflib.get_close_matches(role.lower(), known, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}"
        raise RowProblem(f"{name}: unknown {role_key} {clip(role, 24)!r}; {hint}")
    return known[role]


def column_of(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise RowProblem(f"no `{name}`; the row has {columns_of(row)}")
    return row[name]


def _system(row: Mapping[str, Any]) -> list[Message]:
    system = row.get("system")
    return [] if system is None or system == "" else [Message("system", _text(system, "`system`"))]


def _from_messages(row: Mapping[str, Any]) -> list[Message]:
    messages = with_system(row, read_turns(column_of(row, "messages"), "messages"))
    unmask = row.get("unmask")
    if unmask not in (None, False, True):
        raise RowProblem("`unmask` must be true or false")
    if unmask:  # the row asks for all of its turns to be trained, not only the assistant's
        messages = [m if m.role == "system" or m.train is not None else replace(m, train=True) for m in messages]
    return messages


def turns_of_cell(value: Any, name: str) -> list[Message] | None:
    """The turns that a cell holds, as a list or as text; None where it holds plain text."""
    try:
        turns = turns_in(value)
    except ValueError as error:
        raise RowProblem(f"`{name}` looks like a list of messages, but is {error}") from None
    return None if turns is None else read_turns(turns, name)


def _plain_text(value: Any, name: str) -> str:
    """Text of a cell that stands for one message. A list of messages as text is no such cell."""
    if isinstance(value, str) and turns_of_cell(value, name) is not None:
        raise RowProblem(f"`{name}` holds a list of messages; name the column `messages`, or write the text alone")
    return _text(value, f"`{name}`")


def _from_prompt_completion(row: Mapping[str, Any]) -> list[Message]:
    answer_name = next((name for name in ANSWERS if name in row), "completion")
    prompt, answer = column_of(row, "prompt"), column_of(row, answer_name)
    asked, answered = turns_of_cell(prompt, "prompt"), turns_of_cell(answer, answer_name)
    # Earlier answers are context: only the completion is trained.
    before = [replace(m, train=bool(m.train)) for m in _history(row.get("history"))]
    if asked is None:
        asked = [*_system(row), *before, Message("user", _text(prompt, "`prompt`"))]
    else:
        system, *turns = with_system(row, [replace(m, train=bool(m.train)) for m in asked])
        asked = [system, *before, *turns] if system.role == "system" else [*before, system, *turns]
    return asked + (answered if answered is not None else [_answer(row, answer_name)])


def _answer(row: Mapping[str, Any], name: str) -> Message:
    text = _plain_text(column_of(row, name), name)
    return Message("assistant", text, thought=_thought(row, "", text))


def _from_alpaca(row: Mapping[str, Any]) -> list[Message]:
    instruction = _plain_text(column_of(row, "instruction"), "instruction")
    context_name = "input" if "input" in row else "context"
    context = row.get(context_name)
    context = "" if context is None else _plain_text(context, context_name)
    asked = f"{instruction}\n\n{context}" if instruction.strip() and context.strip() else instruction or context
    answer = _answer(row, "output" if "output" in row else "response")
    return [*_system(row), *_history(row.get("history")), Message("user", asked), answer]


def _history(history: Any) -> list[Message]:
    if is_empty(history):
        return []
    if (turns := turns_of_cell(history, "history")) is not None:
        return turns
    if isinstance(history, str):
        try:
            history = parse_text(history)
        except ValueError:
            raise RowProblem("`history` must be a list of [user, assistant] pairs, not text") from None
    if not isinstance(history, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in history):
        raise RowProblem("`history` must be a list of [user, assistant] pairs")
    texts = [
        (_text(asked, f"history[{i}][0]"), _text(said, f"history[{i}][1]")) for i, (asked, said) in enumerate(history)
    ]
    return [message for asked, said in texts for message in (Message("user", asked), Message("assistant", said))]


def _tools_of(row: Mapping[str, Any]) -> str | None:
    """The row's `tools` as JSON, or None. Raises RowProblem."""
    tools = row.get("tools")
    if is_empty(tools):
        return None
    if isinstance(tools, str):
        try:
            tools = parse_text(tools)
        except ValueError:
            raise RowProblem("`tools` must be a list of objects, not text") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowProblem("`tools` must be a list of objects")
    return json.dumps(tools, ensure_ascii=False) if tools else None


def with_tools(row: Mapping[str, Any], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Add the row's `tools` to the first of its messages. Raises RowProblem."""
    tools = _tools_of(row)
    return messages if tools is None else (replace(messages[0], tools=tools), *messages[1:])


def _from_sharegpt(row: Mapping[str, Any]) -> list[Message]:
    return with_system(row, read_turns(column_of(row, "conversations"), "conversations", "from", "value"))


def with_system(row: Mapping[str, Any], turns: list[Message]) -> list[Message]:
    """Put the row's `system` before turns that have no system message of their own."""
    return turns if turns and turns[0].role == "system" else _system(row) + turns


def _from_text(row: Mapping[str, Any]) -> list[Message]:
    return [Message("text", _plain_text(column_of(row, "text"), "text"))]


# ------------------------------------------------------------------------------------------------------------- choosing

READERS: dict[str, Callable[[Mapping[str, Any]], list[Message]]] = {
    "messages": _from_messages,
    "prompt_completion": _from_prompt_completion,
    "alpaca": _from_alpaca,
    "sharegpt": _from_sharegpt,
    "text": _from_text,
}


def detect(columns: Iterable[str]) -> str | None:
    """Format of a row with these columns, or None."""
    columns = set(columns)
    if "messages" in columns:
        return "messages"
    if "conversations" in columns:
        return "sharegpt"
    if "instruction" in columns and columns & {"output", "response"}:
        return "alpaca"
    if "prompt" in columns and columns & set(ANSWERS):
        return "prompt_completion"
    return "text" if "text" in columns else None
