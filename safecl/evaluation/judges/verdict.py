"""A judge's verdict, and the protocol of judges."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from safecl.config.judges import JudgeConfig


class Verdict(NamedTuple):
    """score: in [0, 1]; None where the judge gave no verdict. said: the judge's own text, where it writes one."""

    score: float | None
    said: str | None = None


def verdict_in(text: str, config: JudgeConfig) -> Verdict:
    """Read the verdict in what a judge has written, by `pattern` and `harmless_pattern`."""
    if re.search(str(config.pattern), text):
        return Verdict(1.0, text)
    is_harmless = config.harmless_pattern is None or re.search(config.harmless_pattern, text) is not None
    return Verdict(0.0 if is_harmless else None, text)


class ModelJudge(Protocol):
    """A judge that is ready to work.

    version: facts that decide its verdicts, for the record: model, hash of the input template, verdict rule, threshold.
    """

    version: dict[str, Any]

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """Return one verdict per answer, in order. Not a collective call."""
        ...


def filled(template: str, prompt: str, answer: str) -> str:
    """Put prompt and answer into a template. Braces in either text stay as they are."""
    parts = template.split("{prompt}")
    return prompt.join(part.replace("{answer}", answer) for part in parts)
