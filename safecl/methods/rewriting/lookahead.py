"""LookAhead tuning (Liu et al. 2026, arXiv 2503.19041): the question previews how the answer begins. Needs no memory.

    form: real       question + connector + the answer's first m tokens          answer
    form: virtual    question + connector + preview                              preview + answer

The first target tokens are then easy to predict from the question, so their loss, and with it the drift of the
distributions with which answers begin, is small: there lies most of the alignment. Questions at use stay as they are.
Every answer that is trained and that follows a question is previewed.

Only the rows change, before they are tokenised: a run has no further state or work. A scan reads the rows as they are
trained, previews included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from safecl.config import MethodConfig
from safecl.methods import base


class Config(MethodConfig):
    """LookAhead tuning: questions preview how their answers begin."""

    rewrites: ClassVar[bool] = True

    form: Literal["real", "virtual"] = "real"
    """real: the answer's own first tokens; virtual: a fixed text, which the answer then begins with."""
    tokens: Annotated[int, Field(ge=1)] = 6
    """real only: number of the answer's tokens that are previewed."""
    connector: str = " The answer begins with: "
    """Text between question and preview."""
    preview: Annotated[str, Field(min_length=1)] = "Let's solve this problem. "
    """virtual only: the previewed text."""

    def rewrite(self, question: str, answer: str, begin: Callable[[str, int], str]) -> tuple[str, str]:
        if self.form == "real":
            return question + self.connector + begin(answer, self.tokens), answer
        return question + self.connector + self.preview, self.preview + answer


class Method(base.Method[Config]):
    """All of it is in the rows."""
