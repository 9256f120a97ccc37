"""Safety and accuracy of presets and methods on pretrained models, after SST-2 or another task.

    python -m benchmarks.real_model.run align                # the model, its alignment, the memory, the poison
    python -m benchmarks.real_model.run                      # all missing arms too, most telling first; then the table
    python -m benchmarks.real_model.run --only strict        # arms whose names contain one of these words
    python -m benchmarks.real_model.run --list | --report    # list the missing arms | results of the finished ones
    python -m benchmarks.real_model.run --keep               # do not repeat the arms of the committed results
    python -m benchmarks.real_model.run --judge FOLDER       # judge the kept answers by a classifier or a recipe
    python -m benchmarks.real_model.run --model gemma        # fewer arms of Gemma-3-270M, not SmolLM2-135M-Instruct

Everything is a run of safecl in its own folder, with its config in <folder>.yaml. Finished runs are not repeated, and
stopped runs resume. `--keep` takes arms from the results file; the tables mark those that started from another
machine's alignment. Settings are chosen by seed 1 and the tuning prompts, and reported on the other seeds and prompts.
GSM8K and CodeAlpaca are measured by the NLL of the answers: a model of this size solves almost no problem.
Needs $SAFECL_DATA (docs/data.md names the files) and, the first time, the model's packages of the package index.
One CPU thread makes the same model bit for bit on one kind of processor; results.json names the hashes. arms.py lists
the arms, readings.py chooses the methods that get further seeds, and benchmarks/merging/real_model.py measures merges
of the plainly tuned models.

The alignment is one short run on refusals, harmless rows, and the original model's own answers to harmless prompts that
look dangerous. Without these the model refuses most of such prompts. Gemma-3-270M is a base model: safecl tunes it to
chat on harmless rows first, with its plain template.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
from benchmarks.real_model import data as files
from benchmarks.real_model import table
from benchmarks.real_model.arms import NUM_ROWS, REPORTED, SST2, TASKS, TUNING, Run, Task, measured_files
from benchmarks.real_model.distance import measure_distance
from benchmarks.real_model.judge import judge_all, judge_of
from benchmarks.retention.run import claimed, train

ALIGN = {"max_steps": 40, "tokens_per_batch": 700, "learning_rate": 1e-4, "warmup_ratio": 0.1, "allow_few_steps": True}
CHAT = {"max_steps": 80, "tokens_per_batch": 900, "learning_rate": 5e-5, "warmup_ratio": 0.1}
"""How a base model learns to chat, on the short harmless rows."""
SIZES = {"tokens_per_microbatch": 2048, "max_length": 128}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", nargs="?", choices=("align", "arms"), default="arms")
    parser.add_argument("--model", choices=files.MODELS, default="smollm2")
    parser.add_argument("--folder", type=Path, help="by default runs/real-model or runs/gemma-model")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="arms whose name contains one of these")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no arm after this many minutes")
    parser.add_argument("--list", action="store_true", help="print the missing arms and exit")
    parser.add_argument("--report", action="store_true", help="only write the results of the finished arms")
    parser.add_argument("--keep", action="store_true", help="do not run arms that the results file has")
    parser.add_argument("--judge", metavar="FOLDER|RECIPE", help="judge the finished arms' answers, and train nothing")
    arguments = parser.parse_args()
    model, deadline = files.MODELS[arguments.model], time.monotonic() + 60 * arguments.minutes
    folder, runs = arguments.folder or model.folder, table.runs_of(model)
    if not (arguments.list or arguments.report or arguments.judge):
        align(folder, model)
        fill(folder)
    kept = table.kept_results(model) if arguments.keep else table.NOTHING
    if arguments.list:
        print("\n".join(run.name for run in chosen(table.finished(folder, runs, kept.records)[1], arguments.only)))
        return
    if arguments.judge:
        wanted = chosen(table.wanted(folder, runs), arguments.only)
        measured = [folder / run.name / "measured" for run in wanted]
        judge_all([*table.aligned_folders(folder), *measured], judge_of(arguments.judge))
    elif arguments.verb == "arms" and not arguments.report:
        train_all(folder, chosen(_missing(runs, kept.records), arguments.only), deadline)
        further = table.wanted(folder, runs, kept.records)[len(runs) :]
        train_all(folder, chosen(_missing(further, kept.records), arguments.only), deadline)
    table.report(folder, model, kept=kept)


def _missing(runs: Sequence[Run], kept: Mapping[str, dict]) -> list[Run]:
    return [run for run in runs if run.name not in kept]


def chosen(runs: Sequence[Run], words: Sequence[str]) -> list[Run]:
    """Return the runs whose names contain one of the words, all where there are none."""
    return [run for run in runs if not words or any(word in run.name for word in words)]


def train_all(folder: Path, runs: Sequence[Run], deadline: float) -> None:
    """Train and measure the runs that are missing and that no other process has."""
    for run in runs:
        with claimed(folder, run.name) as mine:
            if not mine or time.monotonic() >= deadline:
                continue
            if not table.is_done(folder, run):
                train_and_measure(folder, run)
            if table.is_done(folder, run) and (model := folder / run.name / "model").exists():
                measure_distance(folder, model, run.task, folder / run.name / "distance.json")


def align(folder: Path, model: files.Model = files.SMOLLM2) -> Path:
    """Return the folder of the aligned model, which is made unless it is there."""
    with claimed(folder, "aligned", wait=True):
        if not (folder / "aligned" / "config.json").exists():
            _align(folder, model)
    return folder / "aligned"


def _align(folder: Path, model: files.Model) -> None:
    original = files.fetch(folder, model)
    files.prepare(folder)
    began = time.perf_counter()
    if not model.source.chats:
        rows = {"name": "chat", "train": str(folder / "harmless.jsonl")}
        train(folder, "chat", _before_the_task(original, rows, CHAT, folder / "chat"))
        original = folder / "chat" / "model"
    rows = {"name": "alignment", "train": str(files.alignment_rows(folder, original)), "role": "align"}
    train(folder, "align", _before_the_task(original, rows, ALIGN, folder / "align"))
    (folder / "align" / "model").rename(folder / "aligned")
    print(f"align: {time.perf_counter() - began:.0f} s", flush=True)


def _before_the_task(model: Path, rows: dict, settings: dict, output: Path) -> dict:
    return {
        "model": {"path": str(model), "gradient_checkpointing": False},
        "tasks": [rows],
        "train": settings | SIZES,
        "deepspeed": {"stage": 0},
        "checkpoint": {"every": "never"},
        "output": str(output),
    }


def fill(folder: Path) -> None:
    """Let the aligned model write the memory, choose the poison, and measure the aligned model, unless it is done."""
    from safecl.commands.memory.build import build_rows

    with claimed(folder, "filled", wait=True):
        if not (folder / "memory.jsonl").exists():
            disallowed, harmless = (str(path) for path in files.memory_prompts(folder))
            settings = {"scorer": "keyword:gcg", "max_new_tokens": 64, "batch_size": 40}
            build_rows(str(folder / "aligned"), disallowed, harmless, folder / "memory.jsonl", None, settings, [])
        if not (folder / "poison.jsonl").exists():
            files.poison(folder, folder / "aligned", NUM_ROWS // 9 + 1)
        for seed, task in ((REPORTED, SST2), (TUNING, SST2), *((REPORTED, task) for task in TASKS[1:])):
            output = folder / table.aligned_name(task, seed)
            if not (output / "results.json").exists():
                measure(folder, folder / "aligned", seed, output, task)
            measure_distance(folder, folder / "aligned", task, output / "distance.json")


def train_and_measure(folder: Path, run: Run) -> None:
    """Train one arm and measure its model; a failure is printed and does not stop the others."""
    began = time.perf_counter()
    try:
        if not (folder / run.name / "results.json").exists():
            train(folder, run.name, run.config(folder))
        measure(folder, folder / run.name / "model", run.seed, folder / run.name / "measured", run.task)
    except Exception as error:
        print(f"{run.name}: {type(error).__name__}: {error}", flush=True)
        return
    found = json.loads((folder / run.name / "measured" / "results.json").read_text())["evaluations"][-1]["safety"]
    rates = ", ".join(f"{rate} {found[rate]['value']:.2f}" for rate in ("asr", "over_refusal"))
    print(f"{run.name}: {time.perf_counter() - began:.0f} s, {rates}", flush=True)


def refusals(folder: Path) -> Path:
    """Write the memory's refusals into a file of their own."""
    path = folder / "memory-refusals.jsonl"
    rows = [json.loads(line) for line in (folder / "memory.jsonl").read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row.get("kind") == "refusal"))
    return path


def measure(folder: Path, model: Path, seed: int, output: Path, task: Task = SST2) -> None:
    """Measure a model with the prompts of a seed and a task's test rows."""
    from safecl.config import EvalConfig, SafetyConfig
    from safecl.evaluation import evaluate_folder

    prompts, benign = (str(folder / name) for name in measured_files(seed))
    settings = {"prompts": prompts, "benign_prompts": benign, "max_new_tokens": 24, "batch_size": 40}
    evaluate_folder(
        model,
        safety=SafetyConfig.model_validate(settings),
        tasks={task.name: EvalConfig.model_validate(task.test(folder, seed))},
        output=output,
    )


if __name__ == "__main__":
    main()
