"""Safety (ASR and other rates) and accuracy of every method after a user's task, on real data.

    python -m benchmarks.retention.run                     # all missing arms, then table, plot and results
    python -m benchmarks.retention.run & python -m benchmarks.retention.run     # two processes share the arms
    python -m benchmarks.retention.run --only sst2-p10     # arms whose names contain one of these words
    python -m benchmarks.retention.run --list | --report   # list the missing arms | table of the finished ones
    python -m benchmarks.retention.run --keep              # also use the arms of the committed results

The rivals are plain fine-tuning and tuned plain fine-tuning. The rates have 95 % intervals; there is no roof. safecl
aligns a Llama of 1.1 M parameters, then fine-tunes it once per arm and setting (task, share of poisoned rows, seed).
Each is a run of safecl in its own folder, with its config in <folder>.yaml. Finished runs are not repeated, and stopped
runs resume. `--keep` also takes arms from benchmarks/results/safety_retention.json if they started from the same
aligned model, bit for bit. Needs $SAFECL_DATA (docs/data.md names the files). arms.py lists the arms,
tuning.py tunes their strengths, materials.py makes what single arms need, and table.py makes
benchmarks/results/safety_retention.json, tables and plot of docs/results-toy.md, and the rates of docs/methods.md.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import yaml

from benchmarks import harness
from benchmarks.retention import materials, real_data
from benchmarks.retention.arms import RUNS, Run
from benchmarks.retention.tuning import TRIALS

EXACT_MATCH = "gsm8k-exact-match"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/retention"))
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="arms whose name contains one of these")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin no more arms after this many minutes"
    )
    parser.add_argument("--list", action="store_true", help="print the missing arms and exit")
    parser.add_argument("--report", action="store_true", help="only write table, plot and results of the finished arms")
    parser.add_argument("--keep", action="store_true", help="do not run arms that the results file has")
    arguments = parser.parse_args()
    folder = arguments.folder
    if not arguments.report and not arguments.list:
        align(folder)
    from benchmarks.retention import table

    kept, solved = table.kept_results(folder) if arguments.keep else ({}, None)

    def wanted(runs: Sequence[Run]) -> list[Run]:
        named = [run for run in runs if not arguments.only or any(word in run.name for word in arguments.only)]
        return [run for run in named if run.name not in kept and not is_done(folder, run)]

    def tuned() -> list[Run]:  # known when their trials are done
        return wanted(table.tuned_runs(table.finished(folder, kept)))

    if arguments.list:
        print("\n".join(run.name for run in [*wanted([*RUNS, *TRIALS]), *tuned()]))
        return
    if not arguments.report:
        deadline = time.monotonic() + 60 * arguments.minutes
        train_all(folder, wanted([*RUNS, *TRIALS]), deadline)
        train_all(folder, tuned(), deadline)
        if solved is None and (not arguments.only or any(word in EXACT_MATCH for word in arguments.only)):
            exact_match(folder, deadline)
    table.report(folder, kept, solved)


def is_done(folder: Path, run: Run) -> bool:
    return (folder / run.name / "results.json").exists()


@contextlib.contextmanager
def claimed(folder: Path, name: str, wait: bool = False) -> Iterator[bool]:
    """Yield whether this process may work on `name`, which no other process does; wait: wait for the other process."""
    (folder / "claims").mkdir(parents=True, exist_ok=True)
    with (folder / "claims" / name.replace("/", "_")).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def train_all(folder: Path, runs: Sequence[Run], deadline: float) -> None:
    for run in runs:
        with claimed(folder, run.name) as mine:
            if mine and not is_done(folder, run) and time.monotonic() < deadline:
                _train_or_report(folder, run)


def _train_or_report(folder: Path, run: Run) -> None:
    """Train one arm; a failure is printed and does not stop the others."""
    began = time.perf_counter()
    try:
        with claimed(folder, "materials", wait=True):
            materials.make(folder, run, train)
        train(folder, run.name, run.config(folder))
    except Exception as error:
        print(f"{run.name}: {type(error).__name__}: {error}", flush=True)
    else:
        print(f"{run.name}: {time.perf_counter() - began:.0f} s", flush=True)


def exact_match(folder: Path, deadline: float = float("inf")) -> None:
    """Measure how many of 100 test problems of GSM8K plain fine-tuning on clean data solves.

    From 5 % on, the table should show this rate instead of the NLL.
    """
    from safecl.config import EvalConfig
    from safecl.evaluation import evaluate_folder

    plain = next(run for run in RUNS if (run.task, run.poison, run.arm.name) == ("gsm8k", 0, "plain"))
    train_all(folder, [plain], deadline)  # with --keep its model may be missing
    with claimed(folder, EXACT_MATCH) as mine:
        if mine and is_done(folder, plain) and not (folder / EXACT_MATCH / "results.json").exists():
            test = real_data.gsm8k_task()["eval"] | {"metric": "gsm8k", "max_rows": 100}
            evaluate_folder(
                folder / plain.name / "model",
                tasks={"gsm8k": EvalConfig.model_validate(test)},
                output=folder / EXACT_MATCH,
            )


def align(folder: Path) -> None:
    """Align the model that all arms start from."""
    with claimed(folder, "aligned", wait=True):
        if (folder / "aligned" / "results.json").exists():
            return
        real_data.prepare(folder)
        real_data.random_model(folder)
        config = real_data.align_config(folder, 0)
        config["train"] |= {"max_steps": 600, "max_length": 160, "tokens_per_batch": 3072}
        config["safety"]["every"] = 200
        train(folder, "aligned", config | {"deepspeed": {"stage": 0}, "checkpoint": {"every": 200, "keep": 1}})


def train(folder: Path, name: str, config: dict) -> None:
    """Run safecl in this process, with its output in <folder>/<name>.log, and note CPU seconds and peak memory in its
    folder. A signal that asked it to stop ends the benchmark with code 75."""
    from safecl.config import load_config
    from safecl.distributed import environment
    from safecl.training.trainer import Trainer

    environment.settle_environment()
    environment.join_launcher()
    path, log = folder / f"{name}.yaml", folder / f"{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    harness.reset_peak_memory()
    began = time.process_time()
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        try:
            harness.fit(Trainer(load_config(path)))
        finally:
            if (folder / name).exists():
                note_cost(folder / name, time.process_time() - began)


def note_cost(run: Path, seconds: float) -> None:
    """Write the CPU seconds of a run, also those before a stop, and the most memory that it had resident."""
    note = run / "cpu-seconds.json"  # on a shared machine wall time means little
    before = json.loads(note.read_text()) if note.exists() else {}
    peak = max(harness.peak_memory(), before.get("peak_bytes", 0))
    note.write_text(json.dumps({"cpu_seconds": round(before.get("cpu_seconds", 0) + seconds, 1), "peak_bytes": peak}))


if __name__ == "__main__":
    main()
