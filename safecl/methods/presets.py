"""Presets of `methods:`: sets of methods with their settings, chosen from the table of docs/results.md. Imports no torch.

`methods: balanced` in a config, or `methods=balanced` on the command line, stands for the settings here; a run's config.yaml names them.
"""

from __future__ import annotations

import copy
import difflib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """`methods` as in a run config; `summary` for whom it is."""

    summary: str
    methods: dict[str, dict[str, Any]]


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


def preset_methods(name: str) -> dict[str, dict[str, Any]]:
    """The methods that a preset stands for, as in a run config. Raises ValueError with what to write instead."""
    from safecl.methods import builtin_methods

    if name in PRESETS:
        return copy.deepcopy(PRESETS[name].methods)
    if name in builtin_methods():
        raise ValueError(f"{name!r} is a method, not a preset; write `methods: {{{name}: {{}}}}`, or one of the presets {_known()}")
    near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`?" if near else f"known presets: {_known()}"
    raise ValueError(f"no preset is named {name!r}; {hint} (or a mapping from methods to their settings)")


def _known() -> str:
    return ", ".join(PRESETS)
