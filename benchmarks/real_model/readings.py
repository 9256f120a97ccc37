"""Conclusions from the finished runs of run.py: the four best methods, which get further seeds, the tuned control, and
how the methods stand beside a published order."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.real_model.arms import (
    AGEM,
    CONTROLS,
    LIMIT_POINTS,
    METHODS,
    NUM_BEST,
    OTHERS,
    PLAIN,
    POISON,
    REPORTED,
    Arm,
    Run,
)

Found = Sequence[dict[str, Any]]
"""Records of runs, as real_model.json has them."""
NOT_YET = "not measured yet"
MERGES = ROOT / "benchmarks" / "results" / "real_model_merges.json"


# ------------------------------------------------------------------------------------------------------ further seeds


def best(found: Found, poison: int) -> list[Arm]:
    """Return the methods with the lowest ASR on the reported seed: of SST-2, and first those within three points of
    plain fine-tuning's accuracy. Return none until all of them are measured."""
    there = on_sst2(found, poison)
    if not {arm.name for arm in (PLAIN, *METHODS)} <= there.keys():
        return []

    def rank(arm: Arm) -> tuple[bool, float, float]:
        each = there[arm.name]
        return not is_near(each, there[PLAIN.name]), each["asr"]["value"], -each["utility"]["value"]

    return sorted(METHODS, key=rank)[:NUM_BEST]


def further_runs(found: Found) -> list[Run]:
    """Return the runs of the best methods with further seeds."""
    return [Run(arm, poison, seed) for poison in POISON for arm in best(found, poison) for seed in OTHERS]


def on_sst2(found: Found, poison: int) -> dict[str, dict[str, Any]]:
    """Return the records of SST-2 and the reported seed by arm."""
    return {run["arm"]: run for run in found if (run["task"], run["poison"], run["seed"]) == ("sst2", poison, REPORTED)}


def is_near(run: dict[str, Any], plain: dict[str, Any]) -> bool:
    """Return whether a run's accuracy is at most three points below plain fine-tuning's."""
    return bool(run["utility"]["value"] >= plain["utility"]["value"] - LIMIT_POINTS - 1e-9)


def missing_sentence(result: dict[str, Any]) -> str:
    """Say how many arms are missing, and which methods have further seeds."""
    found, missing = result["runs"], result["missing"]
    said = f"{len(missing)} of {len(found) + len(missing)} arms are {NOT_YET}." if missing else "All arms are measured."
    for poison in POISON:
        rows = f"With {poison} % poison" if poison else "On clean rows"
        titles = ", ".join(arm.title for arm in best(found, poison))
        said += f" {rows} the four best methods are {titles or NOT_YET}."
    return said


# ------------------------------------------------------------------------------------------------------ tuned control


def control_table(found: Found) -> str:
    """Return plain fine-tuning with each learning rate and batch on clean rows, and which of them is the control: the
    one with the lowest ASR within three points of the accuracy of plain fine-tuning as the other arms have it."""
    there = on_sst2(found, 0)
    grid = [arm for arm in (PLAIN, *CONTROLS) if arm.name in there]
    lines = ["| plain fine-tuning | ASR | complied | accuracy | CPU s |", "|---|---:|---:|---:|---:|"]
    for arm in (PLAIN, *CONTROLS):
        title = arm.title.removeprefix("plain fine-tuning, ") if arm is not PLAIN else "as in the other arms"
        cells = [NOT_YET, "", "", ""]
        if each := there.get(arm.name):
            rates = [f"{each[rate]['value']:.{d}f}" for rate, d in (("asr", 2), ("complied", 2), ("utility", 3))]
            cells = [*rates, f"{each['cpu_seconds']:.0f}"]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    if len(grid) <= len(CONTROLS):
        return "\n".join([*lines, "", f"The tuned control is {NOT_YET}."])
    near = [arm for arm in grid if is_near(there[arm.name], there[PLAIN.name])]
    control = min(near, key=lambda arm: (there[arm.name]["asr"]["value"], -there[arm.name]["utility"]["value"]))
    return "\n".join([*lines, "", f"The tuned control is {control.title}."])


# ------------------------------------------------------------------------------------------------- a published order


@dataclass(frozen=True)
class Published:
    """A method's attack success rate in percent at 10 % poison in a study; arm: its arm here, None for the merge."""

    title: str
    rate: str
    arm: str | None


ORDER = (
    Published("Lisa", "1.2–6.6", "lisa"),
    Published("LwF", "at most 4.3", "lwf"),
    Published("DER", "at most 5.9", "der"),
    Published("A-GEM", "6.8–16.6", AGEM.name),
    Published("SafeLoRA", "at least 24.4", None),
)
"""By "Unforgotten Safety" (Alssum et al. 2025, arXiv 2512.10150), the lowest first."""


def order_table(found: Found, merges: Path = MERGES) -> str:
    """Return the published rates beside those of this model, and which pairs of methods stand in the same order."""
    there = {each.title: here for each in ORDER if (here := _here(each, found, merges)) is not None}
    plain = on_sst2(found, 10).get(PLAIN.name)
    lines = ["| 10 % poison | published ASR, % | ASR here, % | accuracy here |", "|---|---:|---:|---:|"]
    for each in ORDER:
        asr, accuracy = there.get(each.title, (None, None))
        shown = f"{_percent(asr)} | {accuracy:.3f}" if asr else f"{NOT_YET} | "
        lines.append(f"| {each.title} | {each.rate} | {shown} |")
    shown = f"{_percent(plain['asr'])} | {plain['utility']['value']:.3f}" if plain else f"{NOT_YET} | "
    return "\n".join([*lines, f"| plain fine-tuning |  | {shown} |", "", _agreement(there)])


def _percent(rate: dict[str, Any]) -> str:
    return f"{100 * rate['value']:.0f} ({100 * rate['low']:.0f}–{100 * rate['high']:.0f})"


def _here(each: Published, found: Found, merges: Path) -> tuple[dict[str, Any], float] | None:
    """Return (ASR, accuracy) of a method on this model."""
    if each.arm is not None:
        run = on_sst2(found, 10).get(each.arm)
        return (run["asr"], run["utility"]["value"]) if run else None
    made = json.loads(merges.read_text(encoding="utf-8"))["merges"] if merges.exists() else []
    reported = [one for merge in made if merge["kind"] == "safe_lora" for one in merge["reported"]]
    return next(((one["asr"], one["accuracy"]["value"]) for one in reported if one["poison"] == 10), None)


def _agreement(there: dict[str, tuple[dict[str, Any], float]]) -> str:
    """Say of the measured pairs how many stand as published. A pair with overlapping intervals is not told apart."""
    pairs = list(itertools.combinations([each.title for each in ORDER if each.title in there], 2))
    if not pairs:
        return f"Whether the order is the published one is {NOT_YET}."
    same = [(low, high) for low, high in pairs if there[low][0]["high"] < there[high][0]["low"]]
    turned = [(low, high) for low, high in pairs if there[low][0]["low"] > there[high][0]["high"]]
    plural, named = "s" * (len(pairs) > 1), ", ".join(f"{high} below {low}" for low, high in turned)
    said = f"Of {len(pairs)} measured pair{plural}: {len(same)} in the published order, {len(turned)} in the other"
    said += f" ({named})" * bool(turned) + f", {len(pairs) - len(same) - len(turned)} not told apart."
    if absent := [each.title for each in ORDER if each.title not in there]:
        said += f" {', '.join(absent)}: {NOT_YET}."
    return said
