"""The results of benchmarks/retention/run.py: benchmarks/results/safety_retention.json, and docs/results-toy.md.

    python -m benchmarks.retention.run --report

A rate over several seeds is their mean. Its interval reaches from the lowest lower end to the highest upper end of the
seeds' 95 % intervals, so that it covers the choice of prompts and of the measured seeds.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks import ROOT, harness
from benchmarks.retention.arms import (
    AS_THEY_ARE,
    GRID,
    IN_SEQUENCE,
    LIBRARY,
    LIMIT_ASR,
    LIMIT_POINTS,
    METHODS,
    NO_DATA,
    OPTIONS,
    PLAIN,
    POISON,
    RUNS,
    SEARCH,
    SEQUENCE,
    TUNING_SEED,
    UNDER_STRAIN,
    WITH_SCAN,
    Arm,
    Run,
)  # fmt: skip
from benchmarks.retention.tuning import TRIALS, tuned_runs, tuned_table

RESULTS = ROOT / "benchmarks" / "results" / "safety_retention.json"
PAGE, PLOT = ROOT / "docs" / "results-toy.md", ROOT / "docs" / "results.png"
METHODS_PAGE = ROOT / "docs" / "methods.md"
RATES = ("asr", "affirmative", "off_task", "over_refusal")


def report(folder: Path, kept: Mapping[str, dict], solved: dict | None) -> None:
    """Write results, tables and plot from the runs in `folder` and in `kept`, and print how many are missing.

    solved: GSM8K's exact match, for a `folder` without it.
    """
    import torch

    there = finished(folder, kept)
    wanted = list(dict.fromkeys([*RUNS, *TRIALS, *tuned_runs(there)]))
    all_found = [there[run.name] | {"title": run.arm.title} for run in wanted if run.name in there]
    missing = [run.name for run in wanted if run.name not in there]
    found = [each for each in all_found if each["seed"] != TUNING_SEED]
    aligned = json.loads((folder / "aligned" / "results.json").read_text())["evaluations"][-1]["safety"]
    result = {
        "command": "python -m benchmarks.retention.run",
        "machine": harness.machine(torch.device("cpu")),
        "aligned_sha256": digest(folder / "aligned" / "model"),
        "aligned": {rate: aligned[rate] for rate in RATES},
        "gsm8k_exact_match": _exact_match(folder) or solved,
        "missing": missing,
        "runs": all_found,
    }
    harness.write_json(RESULTS, result)
    write_page(found, {"tuned": tuned_table(there), SEQUENCE: sequence_table(found)})
    write_methods_page(found)
    plot(found)
    if missing:
        print(f"{len(missing)} of {len(wanted)} arms are missing; --list names them")


def finished(folder: Path, kept: Mapping[str, dict]) -> dict[str, dict]:
    """Return the records of the finished runs by name: those of `folder`, and others that are kept."""
    there, tuned = dict(kept), list[Run]()
    for _ in range(2):  # which tuned arms there may be is known from the trials
        for run in [*RUNS, *TRIALS, *tuned]:
            if (folder / run.name / "results.json").exists():
                there[run.name] = record(folder, run)
        tuned = tuned_runs(there)
    return there


def kept_results(folder: Path) -> tuple[dict[str, dict], dict | None]:
    """Return the results file's runs by name, and its exact match of GSM8K.

    Return nothing if `folder` has another aligned model.
    """
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if results.get("aligned_sha256") != digest(folder / "aligned" / "model"):
        print("the results file is of another aligned model: nothing is kept")
        return {}, None
    return {f"{r['task']}-p{r['poison']}-s{r['seed']}/{r['arm']}": r for r in results["runs"]}, results[
        "gsm8k_exact_match"
    ]


def digest(model: Path) -> str:
    """Return the SHA-256 of the weights in a model folder."""
    total = hashlib.sha256()
    for path in sorted(model.glob("*.safetensors")):
        total.update(path.read_bytes())
    return total.hexdigest()


def _exact_match(folder: Path) -> dict | None:
    path = folder / "gsm8k-exact-match" / "results.json"
    return json.loads(path.read_text())["evaluations"][-1]["tasks"]["gsm8k"] if path.exists() else None


def record(folder: Path, run: Run) -> dict:
    """Return the numbers of one run from the files in its folder."""
    results = json.loads((folder / run.name / "results.json").read_text())
    end, *others = results["evaluations"][::-1]
    tasks = {"tasks": end["tasks"], "asr_after": [e["safety"]["asr"]["value"] for e in others[::-1][1:]]}
    stored = results["kept_bytes"]
    note = folder / run.name / "cpu-seconds.json"
    return {
        "arm": run.arm.name, "title": run.arm.title, "overrides": list(run.arm.overrides),
        "task": run.task, "poison": run.poison, "seed": run.seed,
        **{rate: end["safety"][rate] for rate in RATES},
        "asr_on_task": end["safety"]["asr_on_task"],
        "utility": end["tasks"]["sst2" if run.task == SEQUENCE else run.task],
        **(tasks if run.task == SEQUENCE else {}),
        "steps": results["steps"],
        "tokens": results["tokens"],
        "seconds": results["seconds"],
        "cpu_seconds": json.loads(note.read_text())["cpu_seconds"] if note.exists() else None,
        "memory_bytes": stored["memory"].get("bytes", 0) + sum(stored["recorded"].values()),
        "state_bytes": sum(stored["state"].values()) + stored["reference"],
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- tables


def mean_rate(records: Sequence[dict], key: str) -> tuple[float, float, float]:
    """Return mean over the seeds, lowest lower end, highest upper end."""
    values = [record[key] for record in records]
    return statistics.mean(v["value"] for v in values), min(v["low"] for v in values), max(v["high"] for v in values)


def of(found: Iterable[dict], arm: Arm, task: str, poison: int) -> list[dict]:
    return [r for r in found if (r["arm"], r["task"], r["poison"]) == (arm.name, task, poison)]


def shown(rate: tuple[float, float, float]) -> str:
    return f"{rate[0]:.2f} ({rate[1]:.2f}–{rate[2]:.2f})"


def seeds(records: Sequence[dict]) -> str:
    return ", ".join(str(seed) for seed in sorted(r["seed"] for r in records))


def size(num_bytes: float) -> str:
    return "–" if num_bytes == 0 else f"{num_bytes / 1e6:.1f} MB"


def row(title: str, records: Sequence[dict], utility_digits: int = 3) -> str:
    value, low, high = mean_rate(records, "utility")
    seconds = [r["cpu_seconds"] for r in records if r["cpu_seconds"] is not None]
    cells = [
        title,
        *(shown(mean_rate(records, rate)) for rate in RATES),
        f"{value:.{utility_digits}f} ({low:.{utility_digits}f}–{high:.{utility_digits}f})",
        f"{statistics.mean(seconds):.0f}" if seconds else "–",
        size(statistics.mean(r["memory_bytes"] for r in records)),
        size(statistics.mean(r["state_bytes"] for r in records)),
        seeds(records),
    ]
    return "| " + " | ".join(cells) + " |"


def table(found: Sequence[dict], arms: Sequence[Arm], task: str, poison: int, utility: str, only: str = "") -> str:
    """Return the table of all arms that have been run, or how to run them if only plain fine-tuning has.

    only: a suffix of the words in that command.
    """
    head = f"| arm | ASR | affirmative | off-task | over-refusal | {utility} | CPU s | memory | state | seeds |"
    rows = [row(arm.title, records) for arm in arms if (records := of(found, arm, task, poison))]
    if not rows or (only and len(rows) == 1):
        return f"Not measured yet: `python -m benchmarks.retention.run --only {task}-p{poison}{only}`."
    return "\n".join([head, "|---|" + "---:|" * 9, *rows])


def tuned(found: Sequence[dict], poison: int) -> Arm | None:
    """Return the control: the arm of the grid with the lowest ASR among those within 3 points of plain's accuracy."""
    grid = {arm: r[0] for arm in [PLAIN, *GRID] if (r := [x for x in of(found, arm, "sst2", poison) if x["seed"] == 0])}
    if PLAIN not in grid:
        return None
    near = [arm for arm, r in grid.items() if r["utility"]["value"] >= grid[PLAIN]["utility"]["value"] - LIMIT_POINTS]
    return min(near, key=lambda arm: (grid[arm]["asr"]["value"], -grid[arm]["utility"]["value"]))


def against_plain(found: Sequence[dict], records: Sequence[dict]) -> float:
    """Return the mean, over the seeds, of an arm's accuracy minus that of plain fine-tuning with the same seed."""
    plain = {r["seed"]: r["utility"]["value"] for r in of(found, PLAIN, records[0]["task"], records[0]["poison"])}
    return statistics.mean(r["utility"]["value"] - plain[r["seed"]] for r in records if r["seed"] in plain)


def search_table(found: Sequence[dict]) -> str:
    """Return the table of settings at 10 % poison and on clean data: first those within both limits, then by ASR."""
    lines = []
    for arm in [*METHODS, *SEARCH, *NO_DATA, *GRID]:
        if records := of(found, arm, "sst2", 10):
            asr, points = mean_rate(records, "asr"), against_plain(found, records)
            holds = asr[0] <= LIMIT_ASR and points >= -LIMIT_POINTS
            affirmative, over_refusal = (shown(mean_rate(records, rate)) for rate in ("affirmative", "over_refusal"))
            poisoned = [shown(asr), affirmative, f"{100 * points:+.1f}", over_refusal, "yes" if holds else "no"]
            cells = [arm.title, *poisoned, *_on_clean_data(found, arm), seeds(records)]
            lines.append((not holds, asr[0], "| " + " | ".join(cells) + " |"))
    columns = ("setting", "ASR", "affirmative", "points against plain", "over-refusal", "holds both")
    head = f"| {' | '.join((*columns, 'clean: ASR', 'clean: points', 'seeds'))} |\n|---|"
    return "\n".join([head + "---:|" * 4 + "---|" + "---:|" * 3, *(line for *_, line in sorted(lines))])


def _on_clean_data(found: Sequence[dict], arm: Arm) -> tuple[str, str]:
    records = of(found, arm, "sst2", 0)
    return (
        (f"{mean_rate(records, 'asr')[0]:.2f}", f"{100 * against_plain(found, records):+.1f}")
        if records
        else ("–", "–")
    )


def sequence_table(found: Sequence[dict]) -> str:
    """Return the table of the three tasks in a row."""
    lines = []
    for arm in IN_SEQUENCE:
        for each in of(found, arm, SEQUENCE, 10):
            asr = [f"{value:.2f}" for value in [*each["asr_after"], each["asr"]["value"]]]
            scores = [f"{each['tasks'][task]['value']:.3f}" for task in ("sst2", "gsm8k", "code")]
            cells = [arm.title, *asr, f"{each['over_refusal']['value']:.2f}", *scores, f"{each['cpu_seconds']:.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    if not lines:
        return f"Not measured yet: `python -m benchmarks.retention.run --only {SEQUENCE}`."
    head = "| arm | ASR after SST-2 | after GSM8K | after CodeAlpaca | over-refusal | SST-2, accuracy | GSM8K, NLL | "
    return "\n".join([head + "CodeAlpaca, NLL | CPU s |", "|---|" + "---:|" * 8, *lines])


def write_page(found: Sequence[dict], others: Mapping[str, str]) -> None:
    """Write the parts of docs/results-toy.md between `<!-- NAME -->` and `<!-- end -->`. others: further parts."""
    if not PAGE.exists():
        return
    arms = [PLAIN, *METHODS]
    parts = {
        f"sst2-{poison}": table(found, [*arms, *chosen(found, poison)], "sst2", poison, "accuracy") for poison in POISON
    }
    parts |= {f"library-{poison}": table(found, [PLAIN, *LIBRARY], "sst2", poison, "accuracy") for poison in POISON}
    alone = [arm for arm in [*METHODS, *LIBRARY] if arm.method in ("er", "der", "derpp", "antibody", "bds", "vaa")]
    compared = [PLAIN, *alone, *OPTIONS]
    parts |= {f"options-{poison}": table(found, compared, "sst2", poison, "accuracy") for poison in POISON}
    parts["sst2-20"] = table(found, [*AS_THEY_ARE, *WITH_SCAN], "sst2", 20, "accuracy")
    parts["strain"] = table(found, [*AS_THEY_ARE, *UNDER_STRAIN], "sst2", 10, "accuracy")
    parts |= {
        f"grid-{poison}": table(found, [PLAIN, *GRID], "sst2", poison, "accuracy", "-s0/plain-") for poison in POISON
    }
    parts |= {
        f"{task}-{p}": table(found, [*arms, *SEARCH], task, p, "nats per answer token")
        for task in ("gsm8k", "code")
        for p in POISON
    }
    if of(found, PLAIN, "sst2", 10):
        parts["search"] = search_table(found)
    harness.renew_page(PAGE, parts | others)


def write_methods_page(found: Sequence[dict]) -> None:
    """Write the attack success rates, clean and with poison, in the last column of docs/methods.md's table.

    Words in brackets that stand there stay. A method, or a setting that is one, without both rates is left alone.
    """
    text = METHODS_PAGE.read_text(encoding="utf-8")
    for arm in [*METHODS, *SEARCH, *LIBRARY, *OPTIONS]:
        clean, poisoned = (of(found, arm, "sst2", poison) for poison in POISON)
        if arm.method and clean and poisoned:
            rates = " / ".join(f"{mean_rate(r, 'asr')[0]:.2f}".removeprefix("0") for r in (clean, poisoned))
            text = re.sub(
                rf"^(\| \[`{re.escape(arm.method)}`\].*\| )[^|(]*?( \([^|]*\))? \|$",
                lambda m, rates=rates: f"{m[1]}{rates}{m[2] or ''} |",
                text,
                flags=re.M,
            )
    METHODS_PAGE.write_text(text, encoding="utf-8")


def chosen(found: Sequence[dict], poison: int) -> list[Arm]:
    """Return the presets, and the tuned control with its seeds."""
    control = tuned(found, poison)
    presets = [arm for arm in SEARCH if arm.preset]
    return presets + (
        [Arm(control.name, f"tuned control: {control.title}")] if control is not None and control is not PLAIN else []
    )


# ----------------------------------------------------------------------------------------------------------------- plot


def plot(found: Sequence[dict]) -> None:
    """Plot ASR and accuracy of every method on SST-2, clean and with 10 % poison."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = [arm for arm in [PLAIN, *METHODS, *(a for a in SEARCH if a.preset)] if of(found, arm, "sst2", 10)]
    if PLAIN not in arms:
        return
    arms.sort(key=lambda arm: -mean_rate(of(found, arm, "sst2", 10), "asr")[0])
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.34 * len(arms) + 1.2), sharey=True)
    for axis, key, title in zip(axes, ("asr", "utility"), ("attack success rate", "accuracy on SST-2"), strict=True):
        for poison, color, marker, shift in ((0, "tab:blue", "o", 0.12), (10, "tab:red", "s", -0.12)):
            rates = [(y, mean_rate(r, key)) for y, arm in enumerate(arms) if (r := of(found, arm, "sst2", poison))]
            ys, values = [y + shift for y, _ in rates], [rate[0] for _, rate in rates]
            errors = [[rate[0] - rate[1] for _, rate in rates], [rate[2] - rate[0] for _, rate in rates]]
            label = "clean" if poison == 0 else f"{poison} % poison"
            axis.errorbar(values, ys, xerr=errors, fmt=marker, color=color, markersize=4, elinewidth=1, label=label)
        axis.set_xlabel(title)
        axis.grid(axis="x", alpha=0.3)
    plain = mean_rate(of(found, PLAIN, "sst2", 10), "utility")[0]
    axes[1].axvspan(plain - LIMIT_POINTS, plain + LIMIT_POINTS, color="gray", alpha=0.15, label="plain ± 3 points")
    axes[0].axvspan(0, LIMIT_ASR, color="gray", alpha=0.15)
    axes[0].set_yticks(range(len(arms)), [arm.title for arm in arms])
    axes[1].legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(PLOT, dpi=110, metadata={"Software": None})
    print(f"wrote {PLOT}")
