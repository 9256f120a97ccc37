"""What a prompt or a row says and where it stands. `Prompt` and `ChatRow` (safecl.data) both have messages, path and
line."""

from __future__ import annotations

from typing import Any

from safecl.data.files import where


def messages_of(prompt: Any) -> tuple:
    """The turns before the answer, of a `Prompt` or of a `ChatRow` (whose last assistant turn is the reference)."""
    messages = tuple(prompt.messages)
    return messages[:-1] if messages and messages[-1].role == "assistant" else messages


def text_of(prompt: Any) -> str:
    """What the user says last."""
    users = [message.content for message in messages_of(prompt) if message.role == "user"]
    return users[-1] if users else ""


def place_of(prompt: Any) -> str:
    """`file:line`, or `file, row 3` where rows are not lines."""
    return where(prompt.path, prompt.line)
