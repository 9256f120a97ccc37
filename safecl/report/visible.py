"""Makes text from a run harmless where it is shown: in HTML pages and in model cards."""

from __future__ import annotations

import re

from safecl.config.texts import visible

_MARKDOWN = re.compile(r"[\\`*\[\]]")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def one_line(text: str) -> str:
    """Put the text on one line, without backticks, which would end a code span."""
    return visible(" ".join(text.replace("`", "'").split()))


def markdown(text: str) -> str:
    """Escape a text for a line of Markdown outside of a code span: it has no markup, no links and no HTML."""
    escaped = _MARKDOWN.sub(lambda found: f"\\{found[0]}", visible(" ".join(text.split())))
    return "".join(_HTML.get(character, character) for character in escaped)
