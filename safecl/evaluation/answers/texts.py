"""The text of a prompt or a row, and its place in the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from safecl.data.messages import ChatRow, Message
from safecl.data.reading.files import where
from safecl.data.reading.rows import Prompt

Q = TypeVar("Q", Prompt, ChatRow)

Question = Prompt | ChatRow
"""A prompt to answer: one without an answer, or a row whose last assistant turn is the reference."""


def under_system(system: str | None, prompts: Sequence[Q]) -> list[Q]:
    """Return the prompts or rows with this system message first, except those that have one of their own."""
    if system is None:
        return list(prompts)
    first = Message("system", system)
    return [_with_first(first, prompt) for prompt in prompts]


def _with_first(first: Message, prompt: Q) -> Q:
    if any(message.role == "system" for message in prompt.messages):
        return prompt
    return replace(prompt, messages=(first, *prompt.messages))


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
