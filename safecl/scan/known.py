"""The prompts that a scan compares an upload with: disallowed ones, and rows that are known to be harmless."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from safecl.config import ConfigError, RunConfig
from safecl.data.messages import ChatRow, DataError
from safecl.data.reading.rows import Prompt, read_prompts, read_rows
from safecl.scan.duplicates import answered_rows, disallowed_prompts


@dataclass(frozen=True)
class Known:
    """disallowed: prompts that the aligned model refuses. benign: those of scan.benign from which the threshold is
    computed, none without it. harmless: further ones, for the views that need some."""

    disallowed: Sequence[Prompt | ChatRow]
    benign: Sequence[Prompt | ChatRow]
    harmless: Sequence[Prompt | ChatRow] = ()


def read_known(config: RunConfig) -> Known:
    """Read the prompts. Raises ConfigError where they are too few (DataError for their files)."""
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
        benign = _answered(settings.benign) if "answer" in settings.views else _prompts(settings.benign)
    harmless: list[Prompt | ChatRow] = []
    if "probe" in settings.views or "answer" in settings.views:
        harmless, benign = [*answered_rows(config), *benign[1::2]], benign[::2]
        refuse_too_few(len(disallowed), len(harmless))
    if settings.benign is not None:
        check_number_of_benign(len(benign), settings.false_alarm)
    return Known(disallowed, benign, harmless)


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


def check_number_of_benign(num: int, alpha: float) -> None:
    """Raise ConfigError where so few harmless rows cannot give a false alarm rate of `alpha`."""
    if math.ceil((num + 1) * (1 - alpha) - 1e-9) > num:
        raise ConfigError(
            f"scan.benign: {num} rows cannot give a false alarm rate of {alpha:g}; "
            f"at least {math.ceil(1 / alpha - 1e-9) - 1} are needed, "
            f"or scan.false_alarm: {math.ceil(1e4 / (num + 1)) / 1e4:g}"
        )
