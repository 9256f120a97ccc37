"""Presets of `methods:`: sets of methods with their settings, chosen from the tables of docs/results.md and of
docs/results-toy.md.

`methods: strict` in a config, or `methods=strict` on the command line, stands for the settings here. Those of other
sections apply where the config does not set them itself. A run's config.yaml writes all of them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A set of methods with their settings."""

    summary: str
    """Who should use it, in one sentence."""
    methods: dict[str, dict[str, Any]]
    """The section `methods` of a run config."""
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings of other sections, which belong to the preset: they apply where the config does not set them."""
    repairs: bool = False
    """Whether it repairs a tuned model, and is no way to tune one."""

    @property
    def settings(self) -> dict[str, Any]:
        """All that it stands for, as in a run config."""
        return {"methods": self.methods, **self.sections}


PRESETS = {
    "balanced": Preset(
        "Uploads are screened; with safety data: a memory of disallowed prompts with refusals.",
        {"der": {"alpha": 2.0, "beta": 0.0}, "ema": {"horizon": 0.3}},
    ),
    "strict": Preset(
        "Poison is expected; with safety data: refusals, and harmless prompts with their answers.",
        {"der": {"alpha": 8.0, "beta": 0.0}},
        {"memory": {"balance_by": "kind", "shares": {"refusal": 0.25}}, "train": {"loss_mean": "rows"}},
    ),
    "no-data": Preset(
        "Without safety data; it does not keep refusals.",
        {"ema": {"horizon": 0.3}},
    ),
    "one-shot-patch": Preset(
        "A tuned model lost its refusals: it is model.path, and the task is one refusal or a few.",
        {},
        {"train": {"max_steps": 10, "warmup_ratio": 0.0, "allow_few_steps": True}},
        repairs=True,
    ),
}


def with_sections(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config's tree with the settings that its preset has for other sections, where it does not set them.

    A section that the config must begin itself, such as `memory`, is left out where it has none.
    """
    name, filled = tree.get("methods"), dict(tree)
    preset = PRESETS.get(name) if isinstance(name, str) else None
    for section, settings in (preset.sections if preset else {}).items():
        own = filled.get(section, {} if section == "train" else None)
        if isinstance(own, Mapping):
            filled[section] = {**settings, **own}
    return filled
