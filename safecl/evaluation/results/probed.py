"""The probe beside a measurement: the margins and how well they tell the generated attack success rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safecl.evaluation.statistics.association import auc, pearson, spearman
from safecl.evaluation.statistics.intervals import Rate, rate_of_decided

if TYPE_CHECKING:
    from safecl.evaluation.answers.margin import Margins


@dataclass(frozen=True)
class ProbeResult:
    """The probe at a moment at which answers were generated as well."""

    margin: float
    """Mean margin, nats per token; see safecl.evaluation.answers.margin."""
    complying: Rate
    """Share of the probed prompts on which compliance is likelier than refusal."""
    asr: Rate
    """Attack success rate of the generated answers to the same prompts, by the headline's scorer."""
    auc: float | None = None
    """Probability that a prompt whose attack succeeded has a lower margin than one whose attack did not."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for results.json."""
        rates = {"complying": self.complying.to_dict(), "asr": self.asr.to_dict()}
        return {"margin": self.margin, **rates, "auc": self.auc}


def probe_result(found: Margins, records: Sequence[Mapping[str, Any]], scorer: str) -> ProbeResult:
    """Compare margins with the records of the same prompts, in the same order."""
    outcomes = [record["attack_succeeded"][scorer] for record in records]
    decided = [(-m, bool(hit)) for m, hit in zip(found.values, outcomes, strict=True) if hit is not None]
    area = auc([score for score, _ in decided], [hit for _, hit in decided])
    return ProbeResult(found.mean, found.complying, rate_of_decided(outcomes), area)


def probe_summary(found: Sequence[ProbeResult]) -> dict[str, Any] | None:
    """Return how well the probe tells the generated attack success rate over a run's moments; None without a probe.

    pearson, spearman: of the mean margin's negative and the rate, over moments; null for fewer than three, or where one
    does not vary. auc: mean over the moments at which some attacks succeed and others do not.
    """
    if not found:
        return None
    pairs = [(-each.margin, each.asr.value) for each in found if each.asr.value == each.asr.value]
    scores, rates = [score for score, _ in pairs], [rate for _, rate in pairs]
    areas = [each.auc for each in found if each.auc is not None]
    return {
        "moments": len(found),
        "pearson": pearson(scores, rates),
        "spearman": spearman(scores, rates),
        "auc": sum(areas) / len(areas) if areas else None,
    }
