"""The text of a prompt or a row, and its place in the data."""

from __future__ import annotations

from safecl.data.messages import ChatRow, Message
from safecl.data.reading.files import where
from safecl.data.reading.rows import Prompt

Question = Prompt | ChatRow
"""A prompt to answer: one without an answer, or a row whose last assistant turn is the reference."""


def messages_of(prompt: Question) -> tuple[Message, ...]:
    """Return the turns before the answer."""
    messages = tuple(prompt.messages)
    return messages[:-1] if messages and messages[-1].role == "assistant" else messages


def text_of(prompt: Question) -> str:
    """Return the last user message."""
    users = [message.content for message in messages_of(prompt) if message.role == "user"]
    return users[-1] if users else ""


def place_of(prompt: Question) -> str:
    """Return `file:line`, or `file, row 3` where rows are not lines."""
    return where(prompt.path, prompt.line)
