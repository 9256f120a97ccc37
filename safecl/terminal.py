"""The terminal that every verb prints on. Text is printed as text: no part of it is markup, and control characters and
marks of direction are written out.

Prompts, answers, names and paths come from others' files. As markup, `[/INST]` in a prompt would be an error, and an
escape sequence would act on the user's terminal. Styles are given beside the text instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.status import Status
from rich.text import Text

from safecl.config.texts import visible


def plain(text: object, style: str = "") -> Text:
    """Return text for a cell or a title of a table, which shows it as it is on any console of rich."""
    return Text(visible(str(text)), style)


def fact(label: str, text: str, width: int = 14) -> Text:
    """Return a label in bold, padded to `width` characters, with its text behind it."""
    return Text.assemble(plain(f"{label:<{width}}", "bold"), plain(text))


class Terminal(Console):
    """A console of rich without markup, emoji codes and highlighting. Lines are not wrapped, unless `soft_wrap` is
    False.

    options: see `rich.console.Console`.
    """

    def __init__(self, *, soft_wrap: bool = True, **options: Any):
        super().__init__(soft_wrap=soft_wrap, markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Write out what is in a `Text`, too. Rich's own control codes, which move a bar's cursor, pass."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)

    def status(self, status: RenderableType, **options: Any) -> Status:
        return super().status(plain(status) if isinstance(status, str) else status, **options)
