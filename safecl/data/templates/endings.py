"""The end of the trained part of an answer: it is the first token that ends the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from safecl.data.templates.chat import OPEN

Span = tuple[int, int]
"""First character and the one after the last."""


def settle_end(text: str, span: Span, tokens: tuple[str, ...]) -> Span:
    """Move the end of the span behind the token that ends the turn.

    Whitespace after that token belongs to the template: generation has stopped. Some templates close their marker
    before the token, and a model trained on that span would never stop.
    """
    start, stop = span
    trimmed = text[start:stop].rstrip()
    if trimmed.endswith(tokens):
        return start, start + len(trimmed)
    rest = text[stop:].lstrip(" ")
    after = next((token for token in tokens if rest.startswith(token)), "")
    return start, (len(text) - len(rest) + len(after) if after else stop)


def cut_behind_end(text: str, span: Span, said: Sequence[str], tokens: Sequence[str], ends: Sequence[str]) -> Span:
    """Cut the span behind the first token that ends an answer: generation stops there, so what the template writes
    behind it (a second end token, a separator) is not learned.

    Args: `said`: what the row itself says; where some of it follows the token, the span goes on to another answer.
    `tokens`: all control tokens; `ends`: those that end an answer.
    """
    start, stop = span
    for match in re.finditer("|".join(map(re.escape, ends)), text[start:stop]):
        begin, end = start + match.start(), start + match.end()
        if text[begin - 1 : begin] == OPEN:  # somebody wrote the token in a message
            continue
        rest = text[end:stop]
        if OPEN in rest:  # as here, behind this end
            continue
        for token in tokens if rest.strip() else ():
            rest = rest.replace(token, "")
        if not rest.strip() or not any(part in rest for part in said):
            return start, end
    return span
