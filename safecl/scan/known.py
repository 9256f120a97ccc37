"""The prompts that a scan compares an upload with: disallowed ones, and rows that are known to be harmless."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from safecl.config import ConfigError, RunConfig
from safecl.data.messages import ChatRow
from safecl.data.reading.rows import Prompt, read_prompts
from safecl.scan.duplicates import disallowed_prompts


@dataclass(frozen=True)
class Known:
    """disallowed: prompts that the aligned model refuses. benign: those of scan.benign, none without it."""

    disallowed: Sequence[Prompt | ChatRow]
    benign: Sequence[Prompt]


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
    benign = read_prompts(settings.benign, only_safe=True) if settings.benign is not None else []
    if settings.benign is not None:
        check_number_of_benign(len(benign), settings.false_alarm)
    return Known(disallowed, benign)


def check_number_of_benign(num: int, alpha: float) -> None:
    """Raise ConfigError where so few harmless rows cannot give a false alarm rate of `alpha`."""
    if math.ceil((num + 1) * (1 - alpha) - 1e-9) > num:
        raise ConfigError(
            f"scan.benign: {num} rows cannot give a false alarm rate of {alpha:g}; "
            f"at least {math.ceil(1 / alpha - 1e-9) - 1} are needed, "
            f"or scan.false_alarm: {math.ceil(1e4 / (num + 1)) / 1e4:g}"
        )
