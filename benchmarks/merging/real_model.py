"""Each merge for safety on a pretrained model, SmolLM2-135M-Instruct after SST-2, beside plain fine-tuning and DER.

    python -m benchmarks.real_model.run --only plain strict   # the models: aligned, plainly tuned, and tuned with DER
    python -m benchmarks.merging.real_model                    # the merges that are missing; then the tables
    python -m benchmarks.merging.real_model --only somf        # merges whose titles contain one of these words
    python -m benchmarks.merging.real_model --report           # only the tables of what is there

Two processes share the merges. `before` is the model before safecl aligned it, `tuned` plain fine-tuning on SST-2 with
0 or 10 % of poisoned rows, seed 0. Each merge gets one sweep on the poisoned model, where the tuning prompts and the
dev set choose the point with the highest accuracy - ASR - over-refusal. That setting is measured on both models with
the other prompts and the test set. CPU seconds are those of the merge with one thread. Writes
benchmarks/results/real_model_merges.json, and the tables of docs/merging.md and docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
from benchmarks import ROOT, harness
from benchmarks.merging import cases
from benchmarks.merging.cases import Case, merit, rates
from benchmarks.real_model import run as pretrained
from benchmarks.real_model.arms import PLAIN, REPORTED, STRICT, TUNING, Run, sst2_test
from benchmarks.retention.run import claimed, train

RESULTS = ROOT / "benchmarks" / "results" / "real_model_merges.json"
PAGES = {"docs/merging.md": ("real-poisoned", "real-clean"), "docs/results.md": ("real-merges",)}
COLUMNS = ("asr", "complied", "over_refusal", "accuracy")
PLAINLY = [Run(PLAIN, poison, REPORTED) for poison in (10, 0)]
RIVALS = [*PLAINLY, *(Run(STRICT, poison, REPORTED) for poison in (10, 0))]
PATCH = Case("`one-shot-patch`, in training", "train", "learning_rate=0.00003,0.0001,0.0003")
CASES = [
    Case("`wise_ft`", "wise_ft", "alpha=0.2:0.8:0.2", ("base",)),
    Case("`lines`", "lines", "alpha=0:0.6:0.3", ("base",)),
    Case("`dare`", "dare", "scale=0.3:0.7:0.2", ("base",), settings={"density": 0.5}),
    Case("`safe_lora`", "safe_lora", "number=50,100,150,210", ("before", "aligned")),
    Case("`safe_merge`", "safe_merge", "tuned_weight=0.3:0.7:0.2", ("before", "aligned"), settings={"threshold": 1}),
    Case("`safety_vector`", "safety_vector", "scale=0.5,1,2", ("before", "aligned")),
    Case("`antidote`, own requests", "antidote", "ratio=0.1,0.3,0.6"),
    Case("`antidote`, harmful rows", "antidote", "ratio=0.1,0.3,0.6", data="poison.jsonl"),
    Case("`panacea`, own requests", "panacea", "rho=0.3,1,3", ()),
    Case("`panacea`, harmful rows", "panacea", "rho=0.3,1,3", (), "poison.jsonl"),
    Case("`safe_delta`", "safe_delta", "s=0.1,1,10", data="memory-refusals.jsonl"),
    PATCH,
    Case("`ssd`", "ssd", "alpha=1,5,20", ()),
    Case("`somf`", "somf", "learning_rate=0.03,0.1", data="memory-refusals.jsonl", settings={"steps": 30}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/real-model"))
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="merges whose titles contain one of them")
    parser.add_argument("--report", action="store_true", help="only write the tables of the finished merges")
    arguments = parser.parse_args()
    folder = arguments.folder
    if not arguments.report:
        pretrained.align(folder)
        pretrained.fill(folder)
        for case in CASES:
            with claimed(folder, f"merge-{case.name}") as mine:
                if mine and (not arguments.only or any(word in case.title for word in arguments.only)):
                    run_case(folder, case)
    report(folder)


# ------------------------------------------------------------------------------------------------------------- merging


def parents_of(folder: Path, case: Case, run: Run) -> dict[str, Any]:
    """Return the models, data and files of a merge on one plainly tuned model, which is made unless it is there."""
    if not (folder / run.name / "results.json").exists():
        train(folder, run.name, run.config(folder))
    places = {"before": ("base", "smollm2"), "base": ("base", "aligned"), "aligned": ("aligned", "aligned")}
    given: dict[str, Any] = {role: folder / path for role, path in (places[name] for name in case.models)}
    if case.data is not None:
        given["data"] = folder / case.data
    if case.kind == "ssd":
        given |= {key: str(fisher(folder, run, rows)) for key, rows in FISHERS.items()}
    return given | {"tuned": folder / run.name / "model"}


FISHERS = {"fisher": "memory", "harmful_fisher": "poison"}
SIGN_BATCHES = 16
"""A quarter of the default, and twice its error."""


def fisher(folder: Path, run: Run, rows: str) -> Path:
    """Return the file with the Fisher information of a tuned model on the rows of one file, made unless it is there."""
    from safecl.commands.fisher import fisher_run
    from safecl.config import validate_tree

    path = folder / run.name / f"fisher-{rows}.safetensors"
    if not path.exists():
        config = Run(PLAIN, 0, run.seed).config(folder)
        config["model"]["path"] = str(folder / run.name / "model")
        config["memory"] = {"source": str(folder / f"{rows}.jsonl"), "max_tokens": 128}
        config["methods"] = {"ewc": {"sign_batches": SIGN_BATCHES}}
        fisher_run(validate_tree(config, "fisher"), path, exact=False)
    return path


def measuring_config(folder: Path) -> dict[str, Any]:
    """Return what a sweep measures: the tuning prompts, and rows of the dev set."""
    config = Run(PLAIN, 10, TUNING).config(folder)
    config["safety"] |= {"max_new_tokens": 24, "batch_size": 40}
    config["tasks"][0]["eval"] = sst2_test(TUNING)
    return config


def run_case(folder: Path, case: Case) -> None:
    """Choose the setting of a merge on the poisoned model, and measure it on both, unless that is done."""
    from safecl.config import validate_tree

    pretrained.refusals(folder)
    began, path = time.perf_counter(), folder / "merges" / f"{case.name}.json"
    if path.exists():
        return
    if case is PATCH:
        points = [patched(folder, PLAINLY[0], point, TUNING) for point in case.points]
    else:
        config = validate_tree(measuring_config(folder), "sweep")
        parents = parents_of(folder, case, PLAINLY[0])
        points = cases.choose(case, parents, config, "sst2", folder / "merge-sweeps" / case.name)
    best = max(points, key=merit)
    one = patched if case is PATCH else lambda folder, run, settings: merged(folder, case, run, settings)
    reported = [one(folder, run, best["settings"]) for run in PLAINLY]
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"title": case.title, "kind": case.kind, "chosen": best, "sweep": points, "reported": reported}
    path.write_text(json.dumps(result, indent=1))
    shown = [(m["poison"], m["asr"]["value"], m["over_refusal"]["value"], m["accuracy"]["value"]) for m in reported]
    print(f"{case.title}: {time.perf_counter() - began:.0f} s, {best['settings']}, {shown}", flush=True)


def merged(folder: Path, case: Case, run: Run, settings: dict[str, Any]) -> dict[str, Any]:
    """Merge one plainly tuned model and measure the result, which is removed."""
    from safecl.merging import merge

    place = folder / "merged" / f"{case.name}-p{run.poison}"
    parents = parents_of(folder, case, run)
    shutil.rmtree(place, ignore_errors=True)
    began = time.process_time()
    merge(case.kind, out=place / "model", **parents, **case.settings, **settings)
    return measured(folder, place, run, settings, time.process_time() - began)


def patched(folder: Path, run: Run, settings: dict[str, Any], seed: int = REPORTED) -> dict[str, Any]:
    """Train the preset one-shot-patch on one refusal, from a plainly tuned model, and measure the result with the
    prompts of a seed."""
    name = f"merged/patch-p{run.poison}-s{seed}-{settings['learning_rate']:g}"
    config = run.config(folder)
    config = {key: config[key] for key in ("model", "deepspeed", "checkpoint", "safety")}
    config["model"] |= {"path": str(folder / run.name / "model")}
    config["tasks"] = [{"name": "patch", "train": str(pretrained.refusals(folder)), "max_rows": 1}]
    sizes = {"tokens_per_batch": 64, "tokens_per_microbatch": 2048, "max_length": 128}
    config |= {"methods": "one-shot-patch", "train": sizes | settings, "output": str(folder / name)}
    shutil.rmtree(folder / name, ignore_errors=True)
    train(folder, name, config)
    seconds = json.loads((folder / name / "cpu-seconds.json").read_text())["cpu_seconds"]
    return measured(folder, folder / name, run, settings, seconds, seed)


def measured(
    folder: Path, place: Path, run: Run, settings: dict[str, Any], seconds: float, seed: int = REPORTED
) -> dict[str, Any]:
    """Measure place/model with the prompts and rows of a seed, and remove it."""
    pretrained.measure(folder, place / "model", seed, place / "measured")
    shutil.rmtree(place / "model")
    found = json.loads((place / "measured" / "results.json").read_text())["evaluations"][-1]
    own = {"poison": run.poison, "settings": settings, "cpu_seconds": round(seconds, 1)}
    return own | rates(found, "sst2")


# -------------------------------------------------------------------------------------------------------------- report


def report(folder: Path) -> None:
    """Write the JSON and the tables of the finished merges."""
    import torch

    order = [case.title for case in CASES]
    found = [json.loads(path.read_text()) for path in (folder / "merges").glob("*.json")]
    found.sort(key=lambda merge: order.index(merge["title"]))
    result = {
        "command": "python -m benchmarks.merging.real_model",
        "machine": harness.machine(torch.device("cpu")),
        "missing": [title for title in order if title not in {merge["title"] for merge in found}],
        "trained": [
            line for run in (*PLAINLY, *(Run(STRICT, p, REPORTED) for p in (10, 0))) for line in rival(folder, run)
        ],
        "aligned": rates(evaluation_in(folder / f"aligned-s{REPORTED}"), "sst2"),
        "merges": found,
    }
    harness.write_json(RESULTS, result)
    for page, marks in PAGES.items():
        for mark in marks:
            cases.replace_table(ROOT / page, mark, table(result, 0 if mark == "real-clean" else 10))
    if result["missing"]:
        print(f"missing: {', '.join(result['missing'])}")


def evaluation_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())["evaluations"][-1]
    return found


def rival(folder: Path, run: Run) -> list[dict[str, Any]]:
    """Return what benchmarks/real_model/run.py has measured of a run, if it has."""
    if not (folder / run.name / "measured" / "results.json").exists():
        return []
    titles = {"plain": "plain fine-tuning", "strict": "DER, in training (preset `strict`)"}
    seconds = json.loads((folder / run.name / "cpu-seconds.json").read_text())["cpu_seconds"]
    own = {"title": titles[run.arm.name], "poison": run.poison, "seed": run.seed, "cpu_seconds": seconds}
    return [own | rates(evaluation_in(folder / run.name / "measured"), "sst2")]


def table(result: dict[str, Any], poison: int) -> str:
    """Return the table of the models that were tuned with this share of poison."""
    lines = [cases.head(COLUMNS, "CPU s")]
    lines.append(cases.row("the aligned model", "", [result["aligned"]], "", COLUMNS))
    for one in result["trained"]:
        if one["poison"] == poison:
            lines.append(cases.row(one["title"], "", [one], f"{one['cpu_seconds']:.0f}", COLUMNS))
    for merge in result["merges"]:
        (one,) = (each for each in merge["reported"] if each["poison"] == poison)
        setting = cases.setting_of(one["settings"])
        lines.append(cases.row(merge["title"], setting, [one], f"{one['cpu_seconds']:.0f}", COLUMNS))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
