"""Presets of `methods:`: sets of methods with their settings, chosen from the table of docs/results.md.

`methods: balanced` in a config, or `methods=balanced` on the command line, stands for the settings here; a run's
config.yaml writes them out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A set of methods with their settings."""

    summary: str
    """Who should use it, in one sentence."""
    methods: dict[str, dict[str, Any]]
    """The section `methods` of a run config."""


PRESETS = {
    "balanced": Preset(
        "With safety data: a memory of disallowed prompts with refusals.",
        {"der": {"alpha": 2.0, "beta": 0.0}, "ema": {"horizon": 0.3}},
    ),
    "no-data": Preset(
        "Without safety data.",
        {"ema": {"horizon": 0.3}},
    ),
}
