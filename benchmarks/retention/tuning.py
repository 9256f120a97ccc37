"""Strengths of methods, tuned for each by the same small budget: five values, one run each.

The runs have a seed, disallowed prompts and test rows (SST-2's dev set) that are not reported, 10 % of poison, and as
many steps as the others. Of the five values the one with the lowest attack success rate is taken among those within 3
points of plain fine-tuning's accuracy; where none is, the one with the highest accuracy. Over-refusal does not choose.
The chosen value is reported on seed 0 with the reported prompts, clean and with poison.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.retention.arms import LIBRARY, LIMIT_POINTS, METHODS, PLAIN, POISON, TUNING_SEED, Arm, Run


@dataclass(frozen=True)
class Strength:
    """One key of an arm's method, with the values that are tried."""

    arm: Arm
    key: str
    values: tuple[float, ...]

    def at(self, value: float) -> Arm:
        """Return the arm with this value."""
        key = f"methods.{self.key}"
        others = tuple(o for o in self.arm.overrides if o.partition("=")[0] != key)
        title = f"{self.arm.title}, {self.key.partition('.')[2]} {value:g}"
        return Arm(f"{self.arm.name}-at-{value:g}", title, (*others, f"{key}={value:g}"), self.arm.memory)


def _strengths() -> Iterator[Strength]:
    arms = {arm.name: arm for arm in [*METHODS, *LIBRARY]}
    tenfold = (0.1, 0.3, 1, 3, 10)
    for name, key, values in (
        ("der", "der.alpha", (0.5, 1, 2, 4, 8)),
        ("er", "er.weight", (0.5, 1, 2, 4, 8)),
        ("derpp", "derpp.alpha", (0.5, 1, 2, 4, 8)),
        ("safe-grad", "safe_grad.rho", tenfold),
        ("sbr", "sbr.weight", (5, 15, 50, 150, 500)),
        ("lisa", "lisa.rho", tenfold),
        ("spag", "spag.eta", (0.003, 0.01, 0.03, 0.1, 1)),
        ("corrective-replay", "corrective_replay.steps", (2, 5, 10, 20, 40)),
        ("ewc-0.3", "ewc.strength", (0.03, 0.1, 0.3, 1, 3)),
        ("online-ewc", "online_ewc.strength", (0.03, 0.1, 0.3, 1, 3)),
        ("bds", "bds.weight", tenfold),
        ("im", "im.weight", (0.01, 0.03, 0.1, 0.3, 1)),
        ("safe-instruct", "safe_instruct.share", (0.01, 0.03, 0.1, 0.2, 0.4)),
        ("i-lora", "i_lora.weight", (0.2, 0.6, 2, 6, 20)),
        ("hierarchical", "hierarchical.strength", (0.01, 0.03, 0.1, 0.3, 1)),
        ("l2-sp", "l2_sp.strength", (0.01, 0.03, 0.1, 0.3, 1)),
        ("lwf-output", "lwf.weight", (1, 3, 10, 30, 100)),
        ("ldifs", "ldifs.weight", (1, 3, 10, 30, 100)),
        ("ema", "ema.horizon", (0.1, 0.2, 0.3, 0.6, 1)),
        ("psmt", "psmt.protected", (0.1, 0.2, 0.3, 0.5, 0.7)),
        ("constrained-sft", "constrained_sft.beta", (0.01, 0.03, 0.1, 0.3, 1)),
        ("antibody", "antibody.temperature", tenfold),
        ("refresh", "refresh.delta", (1e-6, 3e-6, 1e-5, 3e-5, 1e-4)),
        ("swat", "swat.warmup", (0.1, 0.25, 0.5, 0.75, 0.9)),
        ("asft", "asft.strength", tenfold),
    ):
        yield Strength(arms[name], key, values)


STRENGTHS = list(_strengths())
TRIALS = [
    Run(PLAIN, "sst2", 10, TUNING_SEED),
    *(Run(each.at(value), "sst2", 10, TUNING_SEED) for each in STRENGTHS for value in each.values),
]


def chosen_value(found: Mapping[str, dict], strength: Strength) -> float | None:
    """Return the value that its trials choose; None while one of them is missing. found: records by run name."""
    plain = found.get(TRIALS[0].name)
    trials = {value: found.get(Run(strength.at(value), "sst2", 10, TUNING_SEED).name) for value in strength.values}
    made = {value: record for value, record in trials.items() if record is not None}
    if plain is None or len(made) < len(trials):
        return None
    least = plain["utility"]["value"] - LIMIT_POINTS

    def merit(value: float) -> tuple[bool, float, float]:
        accuracy, asr = made[value]["utility"]["value"], made[value]["asr"]["value"]
        holds = accuracy >= least
        return holds, -asr if holds else accuracy, accuracy

    return max(made, key=merit)


def tuned_runs(found: Mapping[str, dict]) -> list[Run]:
    """Return the runs that report the values which are chosen so far."""
    values = [(each, chosen_value(found, each)) for each in STRENGTHS]
    return [Run(each.at(v), "sst2", p, 0) for each, v in values if v is not None for p in reversed(POISON)]


def tuned_table(found: Mapping[str, dict]) -> str:
    """Return the table of chosen strengths, beside the same methods as they were before."""
    lines = []
    for each in STRENGTHS:
        if (value := chosen_value(found, each)) is None:
            continue
        before, after = (
            [found.get(Run(arm, "sst2", p, 0).name) for p in (10, 0)] for arm in (each.arm, each.at(value))
        )
        tried = ", ".join(f"{v:g}" for v in each.values)
        cells = [each.arm.title, f"`{each.key}`", tried, f"{value:g}", *_rates(before), *_rates(after)]
        lines.append("| " + " | ".join(cells) + " |")
    if not lines:
        return f"Not measured yet: `python -m benchmarks.retention.run --only s{TUNING_SEED}`."
    columns = ("ASR", "over-refusal", "accuracy", "clean: ASR", "clean: accuracy")
    head = ["method", "key", "tried", "chosen", *(f"before: {c}" for c in columns), *(f"tuned: {c}" for c in columns)]
    return "\n".join(["| " + " | ".join(head) + " |", "|---|---|---|" + "---:|" * 11, *lines])


def _rates(records: Sequence[dict | None]) -> list[str]:
    """Return the cells of a pair of records: with poison, and clean."""
    poisoned, clean = records
    keys = [(poisoned, "asr", 2), (poisoned, "over_refusal", 2), (poisoned, "utility", 3), (clean, "asr", 2)]
    keys.append((clean, "utility", 3))
    return ["–" if record is None else f"{record[key]['value']:.{digits}f}" for record, key, digits in keys]
