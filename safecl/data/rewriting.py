"""Rewrites the questions and answers of a task's rows before they are tokenised, as methods ask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from safecl.data.messages import ChatRow


@dataclass(frozen=True)
class Rewriting:
    """A change of rows. key: all that it depends on; prepared files are kept by it."""

    key: str
    work: Callable[[str, str, Callable[[str, int], str]], tuple[str, str]]
    """(question, answer, begin) -> (question, answer); begin(text, n) returns the text of its first n tokens."""

    def apply(self, row: ChatRow, tokenizer: Any) -> ChatRow:
        """Return the row with every answer that is trained, and the question before it, rewritten."""

        def begin(text: str, count: int) -> str:
            return str(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:count]))

        messages = list(row.messages)
        for place in range(1, len(messages)):
            asked, answer = messages[place - 1], messages[place]
            if asked.role == "user" and answer.role == "assistant" and answer.is_trained:
                question, text = self.work(asked.content, answer.content, begin)
                messages[place - 1 : place + 1] = [replace(asked, content=question), replace(answer, content=text)]
        return replace(row, messages=tuple(messages))
