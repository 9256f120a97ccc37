"""The results of run.py: benchmarks/results/real_model.json and gemma_model.json, the tables of docs/results.md, and
the picture of README.md."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import ROOT, harness
from benchmarks.real_model.arms import CODE, CONTROLS, FEWER_RUNS, GSM8K, REPORTED, RUNS, SST2, TASKS, TUNING, Run, Task
from benchmarks.real_model.data import GEMMA, SMOLLM2, Model
from benchmarks.real_model.judge import JUDGE, rates_of
from benchmarks.real_model.readings import control_table, further_runs, missing_sentence, order_table
from benchmarks.retention.table import digest, size

RESULTS = ROOT / "benchmarks" / "results" / "real_model.json"
PAGE = ROOT / "docs" / "results.md"
PICTURE = ROOT / "docs" / "real-model.svg"
MARK = " †"
OTHERS_TOLD = (
    "† Measured on another machine, from an alignment by the same recipe: processors round bf16 differently, so the "
    "weights of the aligned model differ in their last bits."
)
SHOWN = ("plain", "balanced", "strict")
"""Arms of the picture."""
RATES = ("asr", "complied", "affirmative", "off_task", "over_refusal")
ALIGNED = tuple((task, seed) for task in TASKS for seed in (REPORTED, TUNING))
"""What the aligned model may be measured on."""
TABLES = {"": (SST2, False), "-gsm8k": (GSM8K, False), "-code": (CODE, False), "-tuning": (SST2, True)}
"""The task of each table by the end of its mark, and whether it shows the tuning seed."""


@dataclass(frozen=True)
class Kept:
    """Records of the results file by the names of their runs, and the rates of the aligned models that these started
    from, by the SHA-256 of their weights."""

    records: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    alignments: Mapping[str, dict[str, Any]] = field(default_factory=dict)


NOTHING = Kept()


def runs_of(model: Model) -> list[Run]:
    """Return the runs of a model, but for the further seeds of its best methods."""
    return RUNS if model is SMOLLM2 else FEWER_RUNS


def results_of(model: Model) -> Path:
    return RESULTS.with_name(f"{model.mark}_model.json")


def report(
    folder: Path,
    model: Model = SMOLLM2,
    page: Path = PAGE,
    results: Path | None = None,
    kept: Kept = NOTHING,
) -> None:
    """Write the JSON and the tables from the runs in `folder` and the kept records, and print how many are missing."""
    import torch

    found, missing = finished(folder, runs_of(model), kept.records)
    own = _digest(folder / "aligned")
    others = {run["aligned"] for run in found} - {own}
    result = {
        "model": model.title,
        "command": command_of(model),
        "machine": harness.machine(torch.device("cpu")),
        "model_sha256": _digest(folder / model.name),
        "aligned_sha256": own,
        "aligned": {
            aligned_name(task, seed): measured
            for task, seed in ALIGNED
            if (measured := _measured(folder / aligned_name(task, seed), task)) is not None
        },
        "other_alignments": {weights: rates for weights, rates in kept.alignments.items() if weights in others},
        "missing": [run.name for run in missing],
        "runs": found,
    }
    harness.write_json(results or results_of(model), result)
    write_page(page, result, model)
    if page == PAGE and model is SMOLLM2:
        PICTURE.write_text(picture(result) + "\n", encoding="utf-8")
    if missing:
        print(f"{len(missing)} of {len(found) + len(missing)} arms are missing; --list names them")


def finished(
    folder: Path, runs: Sequence[Run], kept: Mapping[str, dict[str, Any]] = NOTHING.records
) -> tuple[list[dict[str, Any]], list[Run]]:
    """Return the records of the finished runs, and the runs that are missing; both with the best methods' further
    seeds. A run that is in the folder goes before its kept record."""
    every = wanted(folder, runs, kept)
    found = {run: each for run in every if (each := _found(folder, run, kept)) is not None}
    own = _digest(folder / "aligned")
    return [{"aligned": own} | each for each in found.values()], [run for run in every if run not in found]


def wanted(folder: Path, runs: Sequence[Run], kept: Mapping[str, dict[str, Any]] = NOTHING.records) -> list[Run]:
    """Return the runs, and those of the best methods with further seeds, once it is known which these are."""
    found = [each for run in runs if (each := _found(folder, run, kept)) is not None]
    return [*runs, *further_runs(found)]


def _found(folder: Path, run: Run, kept: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Return the record of a run, without the digest of the aligned model where the run is in the folder."""
    return record(folder, run) if is_done(folder, run) else kept.get(run.name)


def kept_results(model: Model, results: Path | None = None) -> Kept:
    """Return what the results file has of a model."""
    path = results or results_of(model)
    there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not there.get("runs"):
        return NOTHING
    own = there["aligned_sha256"]
    return Kept(
        {
            f"{run['task']}-p{run['poison']}-s{run['seed']}/{run['arm']}": {"aligned": own} | run
            for run in there["runs"]
        },
        {own: there["aligned"]} | there.get("other_alignments", {}),
    )


def command_of(model: Model) -> str:
    return "python -m benchmarks.real_model.run" + (" --model gemma" if model is GEMMA else "")


def is_done(folder: Path, run: Run) -> bool:
    return (folder / run.name / "measured" / "results.json").exists()


def record(folder: Path, run: Run) -> dict[str, Any]:
    own = {"task": run.task.name, "arm": run.arm.name, "title": run.arm.title, "poison": run.poison, "seed": run.seed}
    measured = _measured(folder / run.name / "measured", run.task) or {}
    return own | _cost(folder / run.name) | measured | _distance(folder / run.name)


def _cost(run: Path) -> dict[str, Any]:
    """Return CPU seconds, the bytes of memory rows with their teacher outputs, those of the methods' state besides
    weights and moments, and the most bytes that were resident, where the run has counted them for itself."""
    noted, results = (json.loads((run / name).read_text()) for name in ("cpu-seconds.json", "results.json"))
    cost, kept = results["cost"], results["kept_bytes"]
    return {
        "cpu_seconds": noted["cpu_seconds"],
        "memory_bytes": cost["memory_bytes"] + cost["recorded_bytes"],
        "state_bytes": sum(kept["state"].values()) + kept["reference"],
        "peak_bytes": noted.get("peak_bytes"),
    }


def aligned_name(task: Task, seed: int) -> str:
    """Return the folder of the aligned model's measurement."""
    return f"aligned-s{seed}" if task == SST2 else f"aligned-s{seed}-{task.name}"


def aligned_folders(folder: Path) -> list[Path]:
    return [folder / aligned_name(task, seed) for task, seed in ALIGNED]


def _digest(model: Path) -> str | None:
    return digest(model) if (model / "config.json").exists() else None


def _measured(folder: Path, task: Task) -> dict[str, Any] | None:
    if not (folder / "results.json").exists():
        return None
    found = json.loads((folder / "results.json").read_text())["evaluations"][-1]
    rates = {rate: found["safety"][rate] for rate in RATES} | {"utility": found["tasks"][task.name]}
    judged = rates_of(folder)
    return rates | _distance(folder) | ({"judged": judged} if judged else {})


def _distance(folder: Path) -> dict[str, Any]:
    path = folder / "distance.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write_page(page: Path, result: dict[str, Any], model: Model) -> None:
    """Replace the tables between the page's marks, those that it has."""
    parts = {end: table(result, task, tuning=tuning) for end, (task, tuning) in TABLES.items()}
    parts |= {
        "-missing": missing_sentence(result),
        "-control": control_table(result["runs"]),
        "-order": order_table(result["runs"]),
    }
    harness.renew_page(page, {f"{model.mark}{end}": part for end, part in parts.items()})


def picture(result: dict[str, Any]) -> str:
    """Draw the shares of refused disallowed and of answered harmless prompts, and the accuracy, with intervals."""
    from safecl.report.charts import dot_plot

    found = {
        (run["arm"], run["poison"]): run for run in result["runs"] if run["seed"] == REPORTED and run["task"] == "sst2"
    }
    aligned = result["aligned"][aligned_name(SST2, REPORTED)]
    rows = [("the aligned model", _shares(aligned, accuracy=False))]
    for poison in (0, 10):
        rows += [
            (f"{arm}, {f'{poison} % poison' if poison else 'clean rows'}", _shares(found[arm, poison]))
            for arm in SHOWN
            if (arm, poison) in found
        ]
    return str(dot_plot(rows, ["refuses disallowed", "answers harmless", "accuracy at SST-2"], width=880))


def _shares(found: dict[str, Any], accuracy: bool = True) -> list[tuple[float, float, float] | None]:
    kept = [(1 - rate["value"], 1 - rate["high"], 1 - rate["low"]) for rate in (found["asr"], found["over_refusal"])]
    task = found["utility"]
    return [*kept, (task["value"], task["low"], task["high"]) if accuracy else None]


def table(result: dict[str, Any], task: Task, *, tuning: bool = False) -> str:
    """Return the runs of a task as a Markdown table, those of the tuning seed or those of the reported ones."""
    rows = [run for run in result["runs"] if run["task"] == task.name and (run["seed"] == TUNING) is tuning]
    rows = [run for run in rows if run["arm"] not in {arm.name for arm in CONTROLS}]  # they have a table of their own
    seeds = len({run["seed"] for run in rows}) > 1
    measured_as = aligned_name(task, TUNING if tuning else REPORTED)
    aligned, own_alignment = result["aligned"].get(measured_as), result.get("aligned_sha256")
    others = {run["aligned"] for run in rows} - {own_alignment}
    judges = sorted({name for found in [*rows, *([aligned] if aligned else [])] for name in found.get("judged", ())})
    utility = "accuracy" if task.metric == "label_accuracy" else "NLL"
    head = [
        "arm",
        "poison",
        *["seed"] * seeds,
        "ASR",
        "complied",
        *(f"harmful by {name.removeprefix(JUDGE)}" for name in judges),
        "over-refusal",
        utility,
        "KL",
        "chat perplexity",
        "CPU s",
        "memory",
        "state",
        "peak memory",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    if aligned:
        lines.append(_line(["the aligned model", "–", *["–"] * seeds], aligned, ["–"] * 4, judges))
    for weights, rates in result.get("other_alignments", {}).items():
        if weights in others and measured_as in rates:
            lines.append(
                _line([f"the aligned model{MARK}", "–", *["–"] * seeds], rates[measured_as], ["–"] * 4, judges)
            )
    for run in _sorted(rows):
        mark = MARK * (run["aligned"] in others)
        own = [run["title"] + mark, f"{run['poison']} %", *[str(run["seed"])] * seeds]
        sizes = [size(run["memory_bytes"]), size(run["state_bytes"])]
        peak = f"{run['peak_bytes'] / 1e9:.1f} GB" if run["peak_bytes"] else "–"
        lines.append(_line(own, run, [f"{run['cpu_seconds']:.0f}", *sizes, peak], judges))
    if others:
        lines += ["", OTHERS_TOLD]
    return "\n".join(lines) if rows or aligned else f"Not measured yet: `{result['command']}`."


def _sorted(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda run: (-run["poison"], run["asr"]["value"], run["title"], run["seed"]))


def _line(own: list[str], found: dict[str, Any], cost: list[str], judges: Sequence[str]) -> str:
    judged = found.get("judged", {})
    shown = [_rate(found[name]) for name in ("asr", "complied")]
    shown += [_rate(judged[name]) if name in judged else "" for name in judges]
    shown += [_rate(found[name]) for name in ("over_refusal", "utility")]
    shown += [
        f"{found[name]['value']:.{d}f}" if name in found else "" for name, d in (("kl", 2), ("chat_perplexity", 1))
    ]
    return "| " + " | ".join([*own, *shown, *cost]) + " |"


def _rate(rate: dict[str, Any]) -> str:
    digits = 3 if "metric" in rate else 2
    if rate["value"] is None:
        return "undecided"
    return f"{rate['value']:.{digits}f} ({rate['low']:.{digits}f}–{rate['high']:.{digits}f})"
