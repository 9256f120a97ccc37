"""Self-distillation fine-tuning (SDFT, Yang et al. 2024, arXiv 2402.13669; Shenfeld et al. 2026, arXiv 2601.19897): the
task's answers in the aligned model's own words.

    y' ~ p0(. | x, c),      L = - mean_t log p(y'_t | x, y'_<t)

c is the row's own answer, shown to the aligned model as an example beside the question x. Over y' the loss is the
forward KL of the demonstration-conditioned model p0(. | x, c) and the tuned one, up to a constant. The aligned model's
own words are close to what it would say anyway, so tuning on them moves it less; and where c complies with a disallowed
request, y' is what the aligned model makes of it, often a refusal.

`safecl memory rewrite CFG` writes the answers y', greedily and once, before a run: the form of Yang et al. Shenfeld et
al. minimise the reverse KL on answers that the student samples in every step; a run of safecl samples none. An answer
that cannot be used stays as it was, as in the former; the file says which and why. Only the rows change, before they
are tokenised."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

from safecl.config import ConfigError, MethodConfig
from safecl.config.base import Text
from safecl.methods import base


class Config(MethodConfig):
    """SDFT: answers in the aligned model's own words."""

    rewrites: ClassVar[bool] = True
    needs_answers: ClassVar[bool] = True

    answers: Text | None = None
    """The file that `safecl memory rewrite CFG` has written for these rows, which the method needs."""

    @property
    def answers_file(self) -> str | None:
        return self.answers

    def rewrite(self, question: str, answer: str, begin: Callable[[str, int], str]) -> tuple[str, str]:
        assert self.answers is not None, "the config refuses the method without its file"
        known = _answers_in(self.answers, Path(self.answers).stat().st_mtime_ns)
        if (question, answer) not in known:
            raise ConfigError(
                f"methods.sdft.answers: {self.answers} was written for other rows, and one that is trained is not "
                "among them; run `safecl memory rewrite CFG` with this config"
            )
        return question, known[question, answer] or answer


@lru_cache(maxsize=1)
def _answers_in(path: str, changed: int) -> dict[tuple[str, str], str | None]:
    """The rewritten answers of a file by question and answer; None for an answer that stays. changed: time of its last
    change."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return {(row["question"], row["answer"]): row["rewritten"] for row in rows}


class Method(base.Method[Config]):
    """All of it is in the rows."""
