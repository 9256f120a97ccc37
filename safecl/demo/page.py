"""The demonstration's HTML page, and the picture of the README."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safecl.demo.outcome import (
    COLUMNS,
    SIDE_BY_SIDE,
    Outcome,
    RateDict,
    column_title,
    compared,
    groups,
    heading,
    shown_prompt,
    verdict,
)
from safecl.report.charts import Interval, dot_plot
from safecl.report.page import render


def demo_page(outcomes: Sequence[Outcome], *, model: str = "A Llama of about 1 M parameters") -> str:
    """Return the page as self-contained HTML. model: the subject of its first sentence."""
    import safecl

    parts = [_part(group) for group in groups(outcomes)]
    return render(
        "demo.html", parts=parts, version=safecl.__version__, num_prompts=len(outcomes[0].answers), model=model
    )


def _part(group: Sequence[Outcome]) -> dict[str, Any]:
    prompts = [shown_prompt(group), *(prompt for prompt in group[0].answers if prompt != shown_prompt(group))][:6]
    three = compared(group)
    return {
        "heading": heading(group),
        "verdict": verdict(group),
        "group": group,
        "picture": picture(group),
        "titles": [title.format(outcome.title) for title, outcome in zip(SIDE_BY_SIDE, three, strict=True)],
        "prompts": [(prompt, [outcome.answers[prompt] for outcome in three]) for prompt in prompts],
        "columns": [column_title(title) for title in COLUMNS],
        "cells": [[value_of(outcome) for value_of in COLUMNS.values()] for outcome in group],
    }


def picture(group: Sequence[Outcome]) -> str:
    """Draw each model's share of refused disallowed prompts and its accuracy at the task, with intervals, as SVG."""
    rows = [(outcome.title, [_refused(outcome.safety["asr"]), _triple(outcome.accuracy)]) for outcome in group]
    return dot_plot(rows, ["disallowed prompts refused", "accuracy at the new task"])


def _refused(asr: RateDict) -> Interval:
    return 1 - asr["value"], 1 - asr["high"], 1 - asr["low"]


def _triple(rate: RateDict | None) -> Interval | None:
    return None if rate is None else (rate["value"], rate["low"], rate["high"])
