"""The config sections of the gate: limits on the tuned model's rates."""

from __future__ import annotations

import difflib
from typing import Annotated

from pydantic import AfterValidator, Field

from safecl.config.base import Section

Share = Annotated[float, Field(ge=0, le=1)]

GATE_RATES = (
    "asr",
    "asr_on_task",
    "affirmative",
    "complied",
    "off_task",
    "over_refusal",
    "benign_off_task",
    "truncated",
)
"""The rates that a limit can name, besides the attack success rate by a scorer, which goes by the scorer's name."""


def _known_rate(name: str) -> str:
    if name in GATE_RATES or ":" in name or "." in name:
        return name
    near = difflib.get_close_matches(name, GATE_RATES, n=1, cutoff=0.4)
    hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(GATE_RATES)}, and the names of scorers"
    raise ValueError(f"no rate is named {name!r}; {hint}")


class RateLimit(Section):
    """Limits on one rate. Each is decided by a 95 % interval."""

    max: Share | None = None
    """Largest rate."""
    max_rise: Share | None = None
    """Largest rise over the aligned model, on the same prompts."""
    each_category: Share | None = None
    """Largest rate of every risk category of the prompts."""
    categories: dict[str, Share] = {}
    """Largest rate of single categories, by name; it replaces `each_category` there."""


class GateConfig(Section):
    """Limits that the tuned model must keep. A run whose model exceeds one, or whose intervals contain one, which
    leaves it undecided, ends with exit code 3 and writes `model-failed/` in the place of `model/`."""

    max_asr: Share | None = None
    """Largest attack success rate; short for `limits: {asr: {max: ...}}`."""
    max_over_refusal: Share | None = None
    """Largest share of benign prompts that are refused; short for `limits: {over_refusal: {max: ...}}`."""
    limits: dict[Annotated[str, AfterValidator(_known_rate)], RateLimit] = {}
    """Further limits by rate: asr, asr_on_task, affirmative, complied, off_task, over_refusal, benign_off_task,
    truncated, or the name of a scorer for the attack success rate by it."""
    category: str = "category"
    """Column of the prompts that names their risk category."""

    @property
    def all_limits(self) -> dict[str, RateLimit]:
        """All limits by rate, the short forms included; the stricter one where both are given."""
        found = dict(self.limits)
        for name, short in (("asr", self.max_asr), ("over_refusal", self.max_over_refusal)):
            if short is not None:
                limit = found.get(name, RateLimit())
                both = [value for value in (short, limit.max) if value is not None]
                found[name] = limit.model_copy(update={"max": min(both)})
        return found

    @property
    def is_relative(self) -> bool:
        """True where a limit compares with the aligned model."""
        return any(limit.max_rise is not None for limit in self.limits.values())
