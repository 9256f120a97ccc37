"""The prompts that a scan compares an upload with: disallowed ones, and rows that are known to be harmless."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from safecl.config import ConfigError, RunConfig
from safecl.data.messages import ChatRow, DataError
from safecl.data.reading.rows import Prompt, read_prompts, read_rows
from safecl.scan.duplicates import answered_rows, disallowed_prompts

REFUSAL, PROBE, ANSWER = "refusal", "probe", "answer"
"""The views of a scan."""


@dataclass(frozen=True)
class Known:
    """disallowed: prompts that the aligned model refuses. benign: those of scan.benign from which the threshold is
    computed, none without it. harmless: further ones, for the views that need some. views: those of the scan, with
    `auto` settled."""

    disallowed: Sequence[Prompt | ChatRow]
    benign: Sequence[Prompt | ChatRow]
    harmless: Sequence[Prompt | ChatRow] = ()
    views: Sequence[str] = (REFUSAL,)


def read_known(config: RunConfig, *, has_states: bool = True) -> Known:
    """Read the prompts. Raises ConfigError where they are too few (DataError for their files).

    has_states: whether the model gives hidden states, which the probe of `scan.views: auto` needs.
    """
    settings = config.scan
    assert settings is not None, "the config has no `scan` section"
    disallowed = disallowed_prompts(config)
    if not disallowed and not (settings.refusals and settings.benign):
        raise ConfigError(
            "scan: no row of memory.source is a refusal, so there are no prompts that the model is known to refuse; "
            "name some with scan.disallowed"
        )
    benign: Sequence[Prompt | ChatRow] = []
    if settings.benign is not None:
        with_answers = settings.views != "auto" and ANSWER in settings.views
        benign = _answered(settings.benign) if with_answers else _prompts(settings.benign)
    threshold, harmless = benign[::2], [*answered_rows(config), *benign[1::2]]
    if settings.views != "auto":
        views: Sequence[str] = settings.views
    else:
        enough = min(len(disallowed), len(harmless)) >= FEWEST and is_enough(len(threshold), settings.false_alarm)
        views = (REFUSAL, PROBE) if settings.benign is not None and enough and has_states else (REFUSAL,)
    if PROBE not in views and ANSWER not in views:
        threshold, harmless = benign, []
    else:
        refuse_too_few(len(disallowed), len(harmless))
    if settings.benign is not None:
        check_number_of_benign(len(threshold), settings.false_alarm)
    return Known(disallowed, threshold, harmless, views)


def _prompts(path: str) -> list[Prompt]:
    return read_prompts(path, only_safe=True)


def _answered(path: str) -> list[ChatRow]:
    """Read rows with answers. Raises ConfigError where the file has none."""
    needs = "scan.benign: scan.views: answer compares answers, so name rows of the task that are known to be harmless"
    try:
        rows = read_rows(path)[0]
    except DataError as error:
        raise ConfigError(f"{needs}; {error}") from None
    answered = [row for row in rows if row.messages[-1].role == "assistant"]
    if not answered:
        raise ConfigError(f"{needs}; {path} has no row with an answer")
    return answered


FEWEST = 30
"""Known prompts of each kind below which nothing is fitted."""


def refuse_too_few(disallowed: int, harmless: int) -> None:
    """Raise ConfigError where there are too few known prompts to fit a view to."""
    if min(disallowed, harmless) < FEWEST:
        raise ConfigError(
            f"scan.views: probe and answer need at least {FEWEST} disallowed and {FEWEST} harmless prompts, and there "
            f"are {disallowed} and {harmless}; name more with scan.disallowed, scan.benign (every second row is "
            "taken) or the memory's answered rows, or leave both out"
        )


def is_enough(num: int, alpha: float) -> bool:
    """Return whether so many harmless rows can give a false alarm rate of `alpha`."""
    return math.ceil((num + 1) * (1 - alpha) - 1e-9) <= num


def check_number_of_benign(num: int, alpha: float) -> None:
    """Raise ConfigError where so few harmless rows cannot give a false alarm rate of `alpha`."""
    if not is_enough(num, alpha):
        raise ConfigError(
            f"scan.benign: {num} rows cannot give a false alarm rate of {alpha:g}; "
            f"at least {math.ceil(1 / alpha - 1e-9) - 1} are needed, "
            f"or scan.false_alarm: {math.ceil(1e4 / (num + 1)) / 1e4:g}"
        )
