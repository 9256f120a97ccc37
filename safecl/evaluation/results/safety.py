"""The safety of a model at one moment: rates with their intervals, and the records of the answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from safecl.evaluation.categories import ByCategory
from safecl.evaluation.statistics.intervals import Rate

OVER_REFUSAL_SCORER: Final = "prefix:xstest"


@dataclass(frozen=True)
class ThoughtScores:
    """Rates over the thoughts before answers, scored as answers are; an unfinished thought counts as far as it goes."""

    asr: Rate | None
    """Thoughts about disallowed prompts without a refusal, by the headline's scorer; None without such thoughts."""
    asr_by_scorer: dict[str, Rate]
    affirmative: Rate | None
    over_refusal: Rate | None
    """Thoughts about benign prompts with a refusal, by prefix:xstest; None without such thoughts."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for results.json."""
        return {
            **{name: _plain(getattr(self, name)) for name in ("asr", "affirmative", "over_refusal")},
            "asr_by_scorer": {name: value.to_dict() for name, value in self.asr_by_scorer.items()},
        }


@dataclass(frozen=True)
class SafetyResult:
    """Rates with 95 % intervals. `outputs` holds one record per prompt, disallowed ones first."""

    scorer: str
    """Name of the scorer behind `asr`."""
    asr: Rate
    """Attack success rate by that scorer."""
    asr_by_scorer: dict[str, Rate]
    """Attack success rate by each keyword scorer, and by the judge where the config names one."""
    asr_on_task: Rate
    """Neither refused (by `scorer`) nor off-task or incoherent: nearer to harm than `asr`."""
    affirmative: Rate
    off_task: Rate
    off_task_reasons: dict[str, int]
    """Number of disallowed prompts answered off-task, by reason (`off_task_reason`)."""
    over_refusal: Rate | None
    """By `over_refusal_scorer`; None without benign prompts."""
    over_refusal_by_scorer: dict[str, Rate]
    benign_off_task: Rate | None
    """Share of off-task or incoherent answers to benign prompts: a broken model does not refuse."""
    truncated: Rate
    """Share of all answers that reached max_new_tokens."""
    outputs: list[dict[str, Any]] = field(default_factory=list, repr=False)
    complied: Rate | None = None
    """Share of disallowed prompts whose answer begins to do what was asked; None in results of an earlier safecl."""
    over_refusal_scorer: str = OVER_REFUSAL_SCORER
    """Name of the scorer behind `over_refusal`."""
    notes: tuple[str, ...] = ()
    """Reasons to distrust the rates: languages that the scorer does not read, answers too short for keyword:wei."""
    cut_off: Rate | None = None
    """Share of all prompts whose thought does not end; None where every one has an answer."""
    thoughts: ThoughtScores | None = None
    """None where `safety.thoughts` is not `report`, or there are no thoughts."""
    dead: int = 0
    """Answers to disallowed prompts that are empty or incoherent and count as refused or harmless: the gate takes them
    for undecided."""
    benign_dead: int = 0
    """The same of benign prompts, whose dead answers refuse nothing."""
    by_category: ByCategory = field(default_factory=dict)
    """`asr` and `complied` by risk category of the disallowed prompts; empty where they have none."""
    variants: dict[str, SafetyResult] = field(default_factory=dict)
    """The same rates of each of `safety.variants`, by name; their records are among `outputs`."""
    panel: dict[str, Any] | None = None
    """Agreement of two or more judges, see safecl.evaluation.judges.panel."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for results.json; no text."""
        return {
            "scorer": self.scorer,
            "over_refusal_scorer": self.over_refusal_scorer,
            **{name: _plain(getattr(self, name)) for name in _RATES},
            "asr_by_scorer": {name: value.to_dict() for name, value in self.asr_by_scorer.items()},
            "over_refusal_by_scorer": {name: value.to_dict() for name, value in self.over_refusal_by_scorer.items()},
            "off_task_reasons": dict(self.off_task_reasons),
            **{name: value.to_dict() for name in ("cut_off", "thoughts") if (value := getattr(self, name)) is not None},
            **{name: count for name in ("dead", "benign_dead") if (count := getattr(self, name))},
            **({"by_category": _plain_categories(self.by_category)} if self.by_category else {}),
            **({"variants": {name: one.to_dict() for name, one in self.variants.items()}} if self.variants else {}),
            **({"panel": self.panel} if self.panel is not None else {}),
        }


_RATES = ("asr", "asr_on_task", "affirmative", "complied", "off_task", "over_refusal", "benign_off_task", "truncated")


def _plain_categories(found: ByCategory) -> dict[str, dict[str, Any]]:
    return {category: {name: value.to_dict() for name, value in rates.items()} for category, rates in found.items()}


def _plain(value: Rate | None) -> dict[str, Any] | None:
    return None if value is None else value.to_dict()
