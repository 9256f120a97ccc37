"""Judges what folders hold already: a run's or an evaluation's results.json and outputs/, alone or against another's.

Nothing is generated and no model is loaded. Verdicts of judges that `safecl judge` has asked count like those of the
run's own. Two folders are compared prompt by prompt: the rise of each rate with its interval, and McNemar's exact test,
adjusted by Holm over the rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safecl.config import ConfigError, GateConfig, apply_overrides, parse_yaml
from safecl.config.gate import GATE_RATES, variant_of
from safecl.evaluation.gates.gate import gate
from safecl.evaluation.gates.outcomes import (
    Record,
    Scorers,
    in_order_of,
    outcome_of,
    outputs_file,
    read_records,
    records_of,
)
from safecl.evaluation.judges.kept import later_verdicts, with_later_verdicts
from safecl.evaluation.results.checks import TITLES, GateResult
from safecl.evaluation.results.moment import Evaluation
from safecl.evaluation.results.restore import evaluations_of
from safecl.evaluation.results.safety import SafetyResult
from safecl.evaluation.statistics.intervals import Rate, rate_of_decided
from safecl.evaluation.statistics.paired import Rise, holm, mcnemar, rise
from safecl.storage.records import read_record, read_text
from safecl.storage.run_records import Results

VARIANT_RATES = ("asr", "complied")
"""Rates of each variant that are compared."""
RESULTS, CONFIG, OUTPUTS = "results.json", "config.yaml", "outputs"
ALIGNED = ("start", "before ")


@dataclass(frozen=True)
class Measured:
    """The last measurement of safety in a folder."""

    folder: Path
    when: str
    step: int
    safety: SafetyResult
    """With its records where outputs/ has them."""
    aligned: list[Record] | None
    """Records of the aligned model in the same folder; None where there are none."""


@dataclass(frozen=True)
class PairedRate:
    """A rate of two folders on the same prompts."""

    rate: str
    before: Rate
    after: Rate
    rise: Rise
    p_value: float
    """McNemar's exact test over the prompts that are decided in both."""
    adjusted: float
    """The same after Holm's correction over all rates."""

    @property
    def message(self) -> str:
        """One line for the terminal."""
        sign = f"{self.rise.value:+.3f} [{self.rise.low:+.3f}, {self.rise.high:+.3f}]"
        variant, rate = variant_of(self.rate)
        title = TITLES.get(rate, f"attack success rate ({rate})") + (f", {variant}" if variant is not None else "")
        counts = f"{self.rise.gained} gained, {self.rise.lost} lost"
        return f"{title}: {self.before.value:.3f} to {self.after.value:.3f}, {sign}, {counts}, p {self.adjusted:.3g}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        numbers = {"before": self.before.to_dict(), "after": self.after.to_dict(), "rise": self.rise.to_dict()}
        return {"rate": self.rate, **numbers, "p_value": self.p_value, "p_holm": self.adjusted}


@dataclass(frozen=True)
class FolderVerdict:
    """The gate's verdict on a folder, and its rates against another folder."""

    measured: Measured
    gate: GateResult
    against: Measured | None = None
    rates: tuple[PairedRate, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; no text of prompts or answers."""
        found = {"schema": 1, "folder": str(self.measured.folder), "when": self.measured.when}
        against = {"folder": str(self.against.folder), "when": self.against.when} if self.against else None
        rates = [each.to_dict() for each in self.rates]
        return found | self.gate.to_dict() | ({"against": against, "rates": rates} if against else {})


def judge_folder(folder: str | Path, against: str | Path | None = None, overrides: Sequence[str] = ()) -> FolderVerdict:
    """Judge the last measurement in a folder.

    Args: `folder`: of a run or of an evaluation; `against`: another one, whose model takes the place of the aligned one
    in limits on a rise; `overrides`: `safety.gate.max_asr=0.1` and the like, over the gate of the folder's config.
    Raises: ConfigError where there is nothing to judge, no gate, or the two were not asked the same prompts.
    """
    measured = read_measured(folder)
    config = _gate_config(measured.folder, overrides)
    if against is None:
        return FolderVerdict(measured, gate(config, measured.safety, measured.aligned))
    other = read_measured(against)
    records = other.safety.outputs
    rates = paired_rates(other.safety, measured.safety)
    return FolderVerdict(measured, gate(config, measured.safety, records or None), other, tuple(rates))


def read_measured(folder: str | Path) -> Measured:
    """Read the last measurement of safety in a folder. Raises ConfigError."""
    folder = Path(folder)
    results = _results(folder)
    evaluations = evaluations_of(results["evaluations"], folder / RESULTS)
    safe = [(each, each.safety) for each in evaluations if each.safety is not None]
    if not safe:
        raise ConfigError(f"{folder}: no safety was measured there; name safety.prompts and measure again")
    last, safety = safe[-1]
    outputs = [dict(record) for record in _records(folder, last.when, last.step) or ()]
    first = _aligned(folder, safe, last) or aligned_records(folder.parent, outputs)
    judged = later_verdicts(folder, outputs_file(folder / OUTPUTS, last.when, last.step).name)
    safety = with_judges(replace(safety, outputs=outputs), list(judged))
    return Measured(folder, last.when, last.step, safety, first)


def aligned_records(run: Path, asked: Sequence[Record]) -> list[Record] | None:
    """Return the records of a run's aligned model, for a model that was measured without training; None where the
    folder holds none that can be read, or its prompts are not those that were asked."""
    try:
        results = read_record(run / RESULTS, Results)
        evaluations = evaluations_of(results["evaluations"], run / RESULTS) if results is not None else []
        found = _aligned(run, [(each, each.safety) for each in evaluations if each.safety is not None])
        return in_order_of(asked, found) if found is not None else None
    except ConfigError:
        return None


def _aligned(
    folder: Path, safe: Sequence[tuple[Evaluation, SafetyResult]], last: Evaluation | None = None
) -> list[Record] | None:
    """Return the records of the last moment of the aligned model that is not `last`; None where there is none."""
    moments = [each for each, _ in safe if each.when.startswith(ALIGNED) and each is not last]
    return _records(folder, moments[-1].when, moments[-1].step) if moments else None


def with_judges(safety: SafetyResult, judges: Sequence[str]) -> SafetyResult:
    """Add the attack success rates by judges whose verdicts are among the marks of the records."""
    if not judges:
        return safety
    variants = {
        name: replace(of, asr_by_scorer=of.asr_by_scorer | _rates_by(judges, records_of(safety.outputs, f"{name}/asr")))
        for name, of in safety.variants.items()
    }
    rates = _rates_by(judges, records_of(safety.outputs, "asr"))
    return replace(safety, asr_by_scorer=safety.asr_by_scorer | rates, variants=variants)


def _rates_by(judges: Sequence[str], records: Sequence[Record]) -> dict[str, Rate]:
    if not records:  # nothing is there to judge
        return {}
    return {name: rate_of_decided(record["attack_succeeded"][name] for record in records) for name in judges}


def paired_rates(before: SafetyResult, after: SafetyResult) -> list[PairedRate]:
    """Compare two measurements of the same prompts, rate by rate. Raises ConfigError where they are of other prompts,
    or their answers were not kept."""
    if not before.outputs or not after.outputs:
        raise ConfigError("a comparison by prompt needs the records in outputs/ of both folders, and there are none")
    scorers = [name for name in after.asr_by_scorer if name in before.asr_by_scorer]
    found, p_values = [], []
    shared = [name for name in after.variants if name in before.variants]
    of_variants = [f"{name}/{rate}" for name in shared for rate in VARIANT_RATES]
    for name in (*GATE_RATES, *scorers, *of_variants):
        own = records_of(after.outputs, name)
        if not own:
            continue
        then = outcome_of(name, Scorers(before.scorer, before.over_refusal_scorer))
        now = outcome_of(name, Scorers(after.scorer, after.over_refusal_scorer))
        pairs = [(then(a), now(b)) for a, b in zip(in_order_of(own, before.outputs), own, strict=True)]
        decided = [(was, is_) for was, is_ in pairs if was is not None and is_ is not None]
        p_values.append(mcnemar([bool(was) for was, _ in decided], [bool(is_) for _, is_ in decided]))
        first, second = [was for was, _ in pairs], [is_ for _, is_ in pairs]
        found.append((name, rate_of_decided(first), rate_of_decided(second), rise(first, second)))
    adjusted = holm(p_values)
    return [PairedRate(*each, p, q) for each, p, q in zip(found, p_values, adjusted, strict=True)]


# --------------------------------------------------------------------------------------------------------------- files


def _results(folder: Path) -> Results:
    found = read_record(folder / RESULTS, Results)
    if found is not None:
        return found
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    if (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder}: is a model, and nothing was measured there; `safecl eval {folder} safety.prompts=FILE` does, "
            "and its folder can be judged"
        )
    what = "has not finished" if (folder / CONFIG).is_file() else "holds no results"
    raise ConfigError(f"{folder}: {what}; there is no {RESULTS}")


def _records(folder: Path, when: str, step: int) -> list[Record] | None:
    """Return the records of a moment, with the verdicts of judges that were asked later; None where none were kept."""
    path = outputs_file(folder / OUTPUTS, when, step)
    return [*with_later_verdicts(read_records(path), later_verdicts(folder, path.name))] if path.is_file() else None


def _gate_config(folder: Path, overrides: Sequence[str]) -> GateConfig:
    """Return the gate of the folder's config, or of the run that an evaluation's folder lies in, with the overrides."""
    tree: dict[str, Any] = {"safety": {"gate": {}}}
    for path in (folder / CONFIG, folder.parent / CONFIG):
        if (text := read_text(path)) is not None:
            read = parse_yaml(text)
            own = (read.get("safety") or {}).get("gate") if isinstance(read, dict) else None
            tree["safety"]["gate"] = own or {}
            break
    if wrong := next((each for each in overrides if not each.startswith("safety.gate.")), None):
        raise ConfigError(f"{wrong}: only limits can be given here, such as safety.gate.max_asr=0.1")
    limits = apply_overrides(tree, list(overrides))["safety"]["gate"]
    from pydantic import ValidationError

    try:
        config = GateConfig.model_validate(limits)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"safety.gate.{where}: {first['msg'].removeprefix('Value error, ')}") from None
    if not config.all_limits:
        raise ConfigError(f"{folder}: its config has no gate; give a limit, such as safety.gate.max_asr=0.1")
    return config
