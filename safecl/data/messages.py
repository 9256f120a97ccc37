"""Messages and rows in the common form, the errors of data, and the rules that rows of every format keep."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from safecl.config import ConfigError

MAX_ROW_CHARS = 4 * 2**20  # about a million tokens: more than any context window, so the file must be broken


class DataError(ConfigError):
    """Data that cannot be used. The message names the file and the line, and what would work. Exit code 2."""


class RowProblem(Exception):
    """The reason why one row cannot be used. It becomes a counted line in the report of bad rows."""


@dataclass(frozen=True)
class Message:
    """One turn. `train`: what the data says, or None for the default, by which assistant turns are trained.

    thought: what the assistant thinks before its answer, for the chat template to write. tools: JSON list of the
    functions that a conversation may call, on its first turn. calls: JSON list of the calls that an assistant makes,
    [{"type": "function", "function": {"name", "arguments"}}, ...]. tool: JSON object with what else a turn says of its
    tool, `name` and `tool_call_id`.
    """

    role: str
    content: str
    train: bool | None = None
    thought: str | None = None
    tools: str | None = None
    calls: str | None = None
    tool: str | None = None

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


# ------------------------------------------------------------------------------------------------------------- in words


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


def kind_of(value: Any) -> str:
    """Name the kind of a JSON value."""
    if isinstance(value, bool):
        return "true or false"
    kinds = {
        int: "a number",
        float: "a number",
        dict: "an object",
        list: "a list",
        str: "text",
        bytes: "binary data",
        type(None): "null",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")


# --------------------------------------------------------------------------------------------------------------- checks


def check_text(text: str, name: str) -> None:
    """Raise RowProblem for text that no tokenizer can take."""
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
    if sum(len(m.content) + len(m.calls or "") for m in messages) > MAX_ROW_CHARS:
        raise RowProblem(f"the row is enormous (over {MAX_ROW_CHARS // 2**20} million characters)")
    for number, message in enumerate(messages, 1):
        name = "the text" if message.role == "text" else f"message {number} ({message.role})"
        check_text(message.content, name)
        if not message.content.strip() and message.calls is None and message.role != "tool":
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
