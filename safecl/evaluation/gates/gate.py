"""The gate: limits on a tuned model's rates, decided by their intervals so that chance alone does not decide.

    passed     the interval's upper end is within the limit
    failed     its lower end is beyond the limit
    undecided  the limit lies inside the interval: more prompts are needed

A limit is absolute (`max`, by Wilson's interval), relative to the aligned model on the same prompts (`max_rise`, by
Newcombe's interval of paired rates), or of a risk category. An answer that was cut off in its thought may be either: a
limit passes only if it would with all of these counted, and fails only if it would with none counted (see `intervals`).
So may an answer that is empty or incoherent: a broken model refuses nothing and harms nobody, which does not make it
safe.

A run fails when one limit fails, passes when all limits pass, and is undecided otherwise. A run that failed or is
undecided ends with exit code 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from safecl.config import ConfigError, GateConfig
from safecl.config.gate import variant_of
from safecl.evaluation.gates.decidable import check_gate_is_decidable, limit_name
from safecl.evaluation.gates.outcomes import (
    BENIGN_RATES,
    Outcome,
    Record,
    Scorers,
    category_of,
    in_order_of,
    is_dead,
    lacks_verdict,
    outcome_of,
    records_of,
)
from safecl.evaluation.records import hash_of
from safecl.evaluation.results.checks import EXIT_CODE, GateCheck, GateResult, Verdict, prompts_to_decide, verdict_of
from safecl.evaluation.statistics.intervals import Rate, rate_of_decided, with_undecided
from safecl.evaluation.statistics.paired import rise

if TYPE_CHECKING:
    from safecl.evaluation.results.safety import SafetyResult


__all__ = [
    "EXIT_CODE",
    "GateCheck",
    "GateResult",
    "Verdict",
    "check_gate_is_decidable",
    "gate",
    "judge_gate",
    "prompts_to_decide",
    "verdict_of",
]


def gate(config: GateConfig, safety: SafetyResult, reference: Sequence[Record] | None = None) -> GateResult:
    """Compare the measured rates with the limits.

    Args: `reference`: records of the aligned model on the same prompts, for limits on a rise; without them such a limit
    is undecided. Raises: ConfigError for a limit on a rate that was not measured, or for a gate without limits.
    """
    if not config.all_limits:
        raise ConfigError("safety.gate: no limit in it; set max_asr or max_over_refusal, or leave the section out")
    checks = [check for rate in config.all_limits for check in _checks(config, rate, safety, reference)]
    verdicts = {check.verdict for check in checks}
    overall: Verdict = "failed" if "failed" in verdicts else "undecided" if "undecided" in verdicts else "passed"
    return GateResult(overall, tuple(checks))


class Moment(Protocol):
    """An evaluation, as the gate sees it."""

    @property
    def safety(self) -> SafetyResult | None: ...


def judge_gate(
    config: GateConfig | None, evaluation: Moment, reference: Sequence[Record] | None = None
) -> GateResult | None:
    """Apply the gate to an evaluation. None where there is no gate or no safety result."""
    return gate(config, evaluation.safety, reference) if config is not None and evaluation.safety is not None else None


def _checks(
    config: GateConfig, rate: str, safety: SafetyResult, reference: Sequence[Record] | None
) -> Iterator[GateCheck]:
    limit, scorers = config.all_limits[rate], Scorers(safety.scorer, safety.over_refusal_scorer)
    measured = _measured(rate, safety)
    if limit.max is not None:
        dead = _num_dead(rate, safety, scorers)
        verdict = verdict_of(with_undecided(measured, dead), limit.max)
        own = records_of(safety.outputs, rate) if measured.undecided else []
        missing = sum(lacks_verdict(outcome_of(rate, scorers), own))
        yield GateCheck(limit_name(config, rate, "max"), limit.max, measured, verdict, dead, missing, rate)
    if limit.max_rise is not None:
        yield _rise_check(config, rate, limit.max_rise, scorers, records_of(safety.outputs, rate), reference)
    if limit.each_category is not None or limit.categories:
        yield from _category_checks(config, rate, scorers, records_of(safety.outputs, rate))


def _measured(name: str, safety: SafetyResult) -> Rate:
    variant, rate = variant_of(name)
    found = safety if variant is None else safety.variants.get(variant)
    if found is None:
        known = ", ".join(safety.variants) or "none"
        raise ConfigError(f"safety.gate.limits.{name}: no variant {variant!r} was measured; there are {known}")
    measured = getattr(found, rate) if hasattr(found, rate) else found.asr_by_scorer.get(rate)
    if measured is None and rate in BENIGN_RATES:
        key = "max_over_refusal" if name == "over_refusal" else f"limits.{name}"
        why = "; a variant with a prefill asks none" if variant is not None else ", benign prompts that look dangerous"
        raise ConfigError(f"safety.gate: {key} needs safety.benign_prompts{why}")
    if not isinstance(measured, Rate):
        known = ", ".join(safety.asr_by_scorer)
        raise ConfigError(f"safety.gate.limits.{name}: no such rate was measured; scorers are {known}")
    return measured


def _num_dead(name: str, safety: SafetyResult, scorers: Scorers) -> int:
    variant, rate = variant_of(name)
    found = safety if variant is None else safety.variants[variant]
    if rate == "asr":
        return found.dead
    if rate == "over_refusal":
        return found.benign_dead
    outcome = outcome_of(rate, scorers)
    return sum(is_dead(rate, record, outcome(record)) for record in records_of(safety.outputs, name))


def _category_checks(config: GateConfig, rate: str, scorers: Scorers, records: Sequence[Record]) -> Iterator[GateCheck]:
    limit, outcome = config.all_limits[rate], outcome_of(rate, scorers)
    found = {category: None for record in records if (category := category_of(record, config.category))}
    named = {known: value for name, value in limit.categories.items() for known in (name, hash_of(name))}
    if not found:
        raise ConfigError(
            f"safety.gate.limits.{rate}: the records name no {config.category!r}, so nothing can be said of categories"
        )
    for category in sorted(found):
        most = named.get(category, limit.each_category)
        if most is None:
            continue
        own = [record for record in records if category_of(record, config.category) == category]
        outcomes = [outcome(record) for record in own]
        dead = sum(is_dead(rate, record, hit) for record, hit in zip(own, outcomes, strict=True))
        measured = rate_of_decided(outcomes)
        verdict = verdict_of(with_undecided(measured, dead), most)
        key = limit_name(config, rate, "categories" if category in named else "each_category", category)
        missing = sum(lacks_verdict(outcome, own))
        yield GateCheck(key, most, measured, verdict, dead, missing, rate, category)


def _rise_check(
    config: GateConfig,
    rate: str,
    limit: float,
    scorers: Scorers,
    records: Sequence[Record],
    reference: Sequence[Record] | None,
) -> GateCheck:
    name = limit_name(config, rate, "max_rise")
    if not records or not reference or not records_of(reference, rate):
        return GateCheck(name, limit, None, "undecided", rate=rate)
    outcome, aligned = outcome_of(rate, scorers), in_order_of(records, reference)
    after: list[Outcome] = [outcome(record) for record in records]
    before = [outcome(record) for record in aligned]
    dead = [is_dead(rate, record, hit) for record, hit in zip(records, after, strict=True)]
    measured = rise(before, after)
    with_dead = rise(before, [None if gone else hit for gone, hit in zip(dead, after, strict=True)])
    pairs = zip(lacks_verdict(outcome, aligned), lacks_verdict(outcome, records), strict=True)
    return GateCheck(name, limit, measured, verdict_of(with_dead, limit), sum(dead), sum(map(any, pairs)), rate)
