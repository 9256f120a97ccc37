"""Each merge that restores safety on the demonstration's model, beside plain fine-tuning and DER on poisoned data.

    python -m benchmarks.merging.safety                    # seed 10 chooses the settings, 0 to 2 are reported
    python -m benchmarks.merging.safety --seeds 0          # one reported seed, a third of the time
    python -m benchmarks.merging.safety --folder runs/merging-safety --only antidote
    python -m benchmarks.merging.safety --report           # only the table of what is there

The model has 1 M parameters (`safecl demo`): random weights, aligned by safecl, then fine-tuned on a user's task with
10 % of poisoned rows. `base` is the random model, `aligned` the aligned one, `tuned` plain fine-tuning. Each merge gets
one sweep on the choosing seed, and the point with the highest accuracy - ASR - over-refusal is merged and measured on
the reported seeds, whose data and weights the choice has not seen. Rates are of 120 disallowed and 120 benign prompts,
accuracy is that of 200 rows; seconds are those of the merge alone. One CPU thread. Writes
benchmarks/results/merging_safety.json and the table of docs/merging.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

from benchmarks import ROOT, harness
from benchmarks.merging import cases
from benchmarks.merging.cases import Case, merit, rates
from benchmarks.retention.run import train
from safecl.demo.arms import DER, Arm, poisoned
from safecl.demo.materials import align_config, arm_config, write_materials
from safecl.demo.topics import REFUSALS

RESULTS = ROOT / "benchmarks" / "results" / "merging_safety.json"
PAGE = ROOT / "docs" / "merging.md"
PATCH, PATCH_RATES = "`one-shot-patch`, in training", (1e-4, 3e-4, 1e-3)
CHOOSING, REPORTED = 10, [0, 1, 2]
TRAINED = poisoned([Arm("plain", "plain fine-tuning", {}), Arm("der", "DER, in training", DER)])
TASK, COLUMNS = "sentiment", ("asr", "over_refusal", "accuracy")


CASES = [
    Case("`wise_ft`", "wise_ft", "alpha=0.2:0.9:0.1", ("base",)),
    Case("`lines`", "lines", "alpha=0:0.8:0.2", ("base",)),
    Case("`dare`", "dare", "scale=0.3:0.9:0.1", ("base",), settings={"density": 0.5}),
    Case("`safe_lora`", "safe_lora", "number=4:28:4", ("before", "aligned")),
    Case("`safe_merge`", "safe_merge", "tuned_weight=0.3:0.9:0.1", ("before", "aligned"), settings={"threshold": 1}),
    Case("`safety_vector`", "safety_vector", "scale=0.02,0.05,0.1,0.2,0.5,1,1.5", ("before", "aligned")),
    Case("`ssd`", "ssd", "alpha=0.5,1,2,5,10,30,100", ()),
    Case("`safe_delta`", "safe_delta", "s=0.1,1,3,10,30,100,300", data="refusals.jsonl"),
    Case("`somf`", "somf", "learning_rate=0.03,0.1,0.3", data="refusals.jsonl", settings={"steps": 30}),
    Case(
        "`somf`, refusals alone",
        "somf",
        "learning_rate=0.03,0.1,0.3",
        data="refusals.jsonl",
        settings={"steps": 30, "objective": "refusals"},
    ),
    Case("`antidote`, own requests", "antidote", "ratio=0.02,0.05,0.1,0.2,0.3,0.5,0.7"),
    Case("`antidote`, harmful rows", "antidote", "ratio=0.02,0.05,0.1,0.2,0.3,0.5,0.7", data="poison.jsonl"),
    Case(
        "`antidote`, harmful rows, no aligned model", "antidote", "ratio=0.01,0.02,0.05,0.1,0.2,0.3", (), "poison.jsonl"
    ),
    Case("`panacea`, own requests", "panacea", "rho=0.1,0.2,0.5,1,2,3,5", ()),
    Case("`panacea`, harmful rows", "panacea", "rho=0.1,0.2,0.5,1,2,3,5", (), "poison.jsonl"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/merging-safety"))
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="merges whose title contains one of these"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=REPORTED)
    parser.add_argument("--report", action="store_true", help="only write the table of what is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.report:
        chosen = [case for case in CASES if not arguments.only or any(w in case.title for w in arguments.only)]
        for seed in (CHOOSING, *arguments.seeds):
            prepare(arguments.folder / f"seed-{seed}", seed)
        for case in chosen:
            run_case(arguments.folder, case, arguments.seeds)
        if not arguments.only or any(word in PATCH for word in arguments.only):
            run_patch(arguments.folder, arguments.seeds)
    report(arguments.folder, arguments.seeds)


# ------------------------------------------------------------------------------------------------------------ training


def prepare(folder: Path, seed: int) -> None:
    """Align and fine-tune the models of one seed, and write the rows of merges, unless they are there."""
    write_materials(folder, seed=seed, arms=TRAINED)
    configs = {"aligned": align_config(folder, seed)} | {arm.name: arm_config(folder, arm, seed) for arm in TRAINED}
    for name, config in configs.items():
        if not (folder / name / "results.json").exists():
            began = time.perf_counter()
            train(folder, name, config | {"deepspeed": {"stage": 0}, "checkpoint": {"every": "never"}})
            print(f"{folder.name} {name}: {time.perf_counter() - began:.0f} s", flush=True)
    rows = [json.loads(line) for line in (folder / "data" / "memory.jsonl").read_text().splitlines()]
    refusals = [row for row in rows if row["messages"][-1]["content"] in REFUSALS]
    (folder / "data" / "refusals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in refusals))
    for name in ("memory", "poison"):
        estimate(folder, name, seed)


def estimate(folder: Path, name: str, seed: int) -> None:
    """Estimate the Fisher information of the tuned model on the rows of one file, for ssd."""
    from safecl.commands.fisher import fisher_run
    from safecl.config import validate_tree

    path = folder / f"fisher-{name}.safetensors"
    if path.exists():
        return
    config = arm_config(folder, TRAINED[0], seed)
    config["model"]["path"] = str(folder / TRAINED[0].name / "model")
    config["memory"]["source"] = str(folder / "data" / f"{name}.jsonl")
    fisher_run(validate_tree(config | {"deepspeed": {"stage": 0}}, "fisher"), path, exact=False)


# ------------------------------------------------------------------------------------------------------------- merging


def parents_of(folder: Path, case: Case) -> dict[str, Any]:
    """Return the models, data and files of a merge on one seed."""
    places = {
        "before": ("base", "random-model"),
        "base": ("base", "aligned/model"),
        "aligned": ("aligned", "aligned/model"),
    }
    given: dict[str, Any] = {role: folder / path for role, path in (places[name] for name in case.models)}
    if case.data is not None:
        given["data"] = folder / "data" / case.data
    if case.kind == "ssd":
        given |= {"fisher": str(folder / "fisher-memory.safetensors")}
        given |= {"harmful_fisher": str(folder / "fisher-poison.safetensors")}
    return given | {"tuned": folder / TRAINED[0].name / "model"}


def run_patch(folder: Path, seeds: list[int]) -> None:
    """Train the preset one-shot-patch with several learning rates on the choosing seed, and report the best."""
    path = folder / "merges" / "one-shot-patch.json"
    if path.exists():
        return
    points = [patch(folder, CHOOSING, rate) for rate in PATCH_RATES]
    best = max(points, key=merit)
    reported = [{"seed": seed, **patch(folder, seed, best["settings"]["learning_rate"])} for seed in seeds]
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"title": PATCH, "kind": "train", "chosen": best, "sweep": points, "reported": reported}
    path.write_text(json.dumps(result, indent=1))
    print(PATCH, best["settings"], [(m["asr"]["value"], m["accuracy"]["value"]) for m in reported], flush=True)


def patch(folder: Path, seed: int, rate: float) -> dict[str, Any]:
    """Patch the tuned model of one seed, and return what was measured; seconds are those of the whole run."""
    place, name = folder / f"seed-{seed}", f"patch-{rate:g}"
    config = arm_config(place, TRAINED[0], seed)
    config = {key: config[key] for key in ("model", "tasks", "safety", "artifacts", "log")}
    config["model"]["path"] = str(place / TRAINED[0].name / "model")
    config["tasks"][0] |= {"train": str(place / "data" / "refusals.jsonl"), "max_rows": 1}
    train_settings = {"tokens_per_batch": 64, "tokens_per_microbatch": 4096, "max_length": 96, "learning_rate": rate}
    config |= {"methods": "one-shot-patch", "train": train_settings, "output": str(place / name)}
    if not (place / name / "results.json").exists():
        train(place, name, config | {"deepspeed": {"stage": 0}, "checkpoint": {"every": "never"}})
    found = json.loads((place / name / "results.json").read_text())
    seconds = round(json.loads((place / name / "cpu-seconds.json").read_text())["cpu_seconds"], 1)
    return {"settings": {"learning_rate": rate}, "seconds": seconds, **rates(found["evaluations"][-1], TASK)}


def run_case(folder: Path, case: Case, seeds: list[int]) -> None:
    """Choose the setting of a merge, and measure it on the reported seeds, unless that is done."""
    from safecl.config import load_config

    place = folder / f"seed-{CHOOSING}"
    config = load_config(place / f"{TRAINED[0].name}.yaml")
    points = cases.choose(case, parents_of(place, case), config, TASK, folder / "sweeps" / case.name)
    best = max(points, key=merit)
    path = folder / "merges" / f"{case.name}.json"
    known = json.loads(path.read_text())["reported"] if path.exists() else []
    done = {one["seed"]: one for one in known}
    for seed in seeds:
        done[seed] = done.get(seed) or measure(folder / f"seed-{seed}", case, best["settings"], seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    reported = [done[seed] for seed in sorted(done)]
    result = {"title": case.title, "kind": case.kind, "chosen": best, "sweep": points, "reported": reported}
    path.write_text(json.dumps(result, indent=1))
    print(case.title, best["settings"], [(m["asr"]["value"], m["accuracy"]["value"]) for m in reported], flush=True)


def measure(folder: Path, case: Case, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Merge one folder and measure it."""
    from safecl.evaluation import evaluate_target
    from safecl.merging import merge

    out = folder / "merged" / case.name
    shutil.rmtree(out, ignore_errors=True)
    report = merge(case.kind, out=out, **parents_of(folder, case), **case.settings, **settings)
    config = folder / f"{TRAINED[0].name}.yaml"
    found = evaluate_target(config, [f"model.path={out}"], output=folder / "measured" / out.name)
    return {"seed": seed, "seconds": round(report.seconds, 2), **rates(found.evaluation.to_dict(), TASK)}


# -------------------------------------------------------------------------------------------------------------- report


def report(folder: Path, seeds: list[int]) -> None:
    """Write the JSON and the table of the finished merges."""
    runs = {
        name: [trained(folder / f"seed-{seed}", name, seed) for seed in seeds] for name in ("aligned", "plain", "der")
    }
    merges = [json.loads(path.read_text()) for path in sorted((folder / "merges").glob("*.json"))]
    order = [*(case.title for case in CASES), PATCH]
    missing = [title for title in order if title not in {found["title"] for found in merges}]
    merges.sort(key=lambda found: order.index(found["title"]))
    command = "python -m benchmarks.merging.safety"
    machine = harness.machine(torch.device("cpu"))
    result = {"command": command, "machine": machine, "choosing_seed": CHOOSING}
    result |= {"missing": missing, "trained": runs, "merges": merges}
    harness.write_json(RESULTS, result)
    cases.replace_table(PAGE, "made by benchmarks/merging/safety.py", table(result))


def trained(folder: Path, name: str, seed: int) -> dict[str, Any]:
    """Return what a run of one seed measured: the aligned model before the task, or an arm after it."""
    arm = TRAINED[0].name if name == "aligned" else f"{name}-poisoned"
    found = json.loads((folder / arm / "results.json").read_text())["evaluations"]
    return {"seed": seed, **rates(found[0] if name == "aligned" else found[-1], TASK)}


def table(result: dict[str, Any]) -> str:
    """Return a Markdown table."""
    lines = [cases.head(COLUMNS)]
    titles = {"aligned": "the aligned model", "plain": "plain fine-tuning", "der": "DER, in training"}
    lines += [cases.row(titles[name], "", seeds, "", COLUMNS) for name, seeds in result["trained"].items()]
    for found in result["merges"]:
        setting, reported = cases.setting_of(found["chosen"]["settings"]), found["reported"]
        seconds = statistics.median(one["seconds"] for one in reported)
        alone = f" (seed {reported[0]['seed']} alone)" if len(reported) < len(result["trained"]["plain"]) else ""
        lines.append(cases.row(found["title"] + alone, setting, reported, f"{seconds:.1f}", COLUMNS))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
