"""Makes a run folder that is stopped in the middle, and what the same safecl makes of it in the end.

    python -m tests.equality.stopped_run tests/fixtures/run-format-1

Later versions must resume such a folder, see tests/training/test_old_run_folder.py. It is made once for each version of
the format, by a safecl that writes this version. No file in it holds an absolute path, a process or a host.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tests.equality.materials import write_materials
from tests.equality.memory import exported_rows
from tests.equality.ranks import CACHE, ROOT, Ended, run_safecl

RANKS = 2
STEPS_PER_TASK = 16
STOP_AFTER = 20
TASKS = ("first", "second", "third")
CONFIG: dict[str, Any] = {
    "model": {"path": "base", "dtype": "fp32", "gradient_checkpointing": False},
    "tasks": [{"name": name, "train": f"data/{name}.jsonl"} for name in TASKS],
    "memory": {
        "source": "data/memory.jsonl", "replay_ratio": 0.5, "max_tokens": 24, "keep_task_rows": 6, "teacher": {"k": 8},
    },
    "methods": {
        "der": {"alpha": 1.0, "beta": 0.5},
        "ewc": {"strength": 1.0, "sign_batches": 4, "rows_per_batch": 4},
        "ema": {"decay": 0.7},
    },
    "train": {
        "max_steps": STEPS_PER_TASK, "tokens_per_batch": 120, "tokens_per_microbatch": 64, "max_length": 32,
        "learning_rate": 2e-3, "eps": 1e-4, "seed": 3, "allow_few_steps": True,
    },
    "deepspeed": {"stage": 3},
    "safety": {"prompts": "data/prompts.jsonl", "max_new_tokens": 4},
    "checkpoint": {"every": 8, "keep": 1},
    "artifacts": {"folder": "artifacts"},
    "output": "stopped",
}  # fmt: skip
STOPPED = 75
ROW_COLUMNS = ("row_id", "task", "step", "input_ids")


def make(root: Path, target: Path) -> None:
    """Writes the folder with the safecl of the checkout `root`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve() / "run"
        folder.mkdir()
        write_materials(folder)
        (folder / "run.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False), encoding="utf-8")
        _expect(STOPPED, train(folder, root=root, stop_after=STOP_AFTER))
        _forget_this_machine(folder)
        shutil.copytree(folder, target)
        _expect(0, train(folder, root=root))
        _keep_the_end(folder, target / "finished", root)


def train(folder: Path, *overrides: str, root: Path = ROOT, ranks: int = RANKS, stop_after: int | None = None) -> Ended:
    """Starts the run of the folder, or resumes it; sends SIGTERM to the first rank after so many steps."""
    metrics = folder / CONFIG["output"] / "metrics.jsonl"
    stop = partial(_stop_after, metrics, stop_after) if stop_after is not None else lambda processes: None
    return run_safecl(["train", "run.yaml", *overrides], folder, ranks=ranks, root=root, while_running=stop)


def memory_rows(folder: Path, *, root: Path = ROOT) -> list[dict[str, Any]]:
    """The rows that the run's memory holds: ids, tokens, and where they came from."""
    return [{name: row[name] for name in ROW_COLUMNS} for row in exported_rows(folder, CONFIG["output"], root)]


def _stop_after(metrics: Path, steps: int, processes: list[subprocess.Popen]) -> None:
    while all(process.poll() is None for process in processes):
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= steps:
            processes[0].send_signal(signal.SIGTERM)
            return
        time.sleep(0.002)


def _expect(code: int, ended: Ended) -> None:
    if set(ended.codes) != {code}:
        sys.exit(f"exit codes {ended.codes}, not {code}\n{ended.said}")


def _forget_this_machine(folder: Path) -> None:
    """Removes what names a process, a host or an absolute path; the link to the shared outputs becomes relative."""
    shutil.rmtree(folder / CACHE)
    for path in [*folder.rglob("*.lock"), folder / "artifacts" / "models.json"]:
        path.unlink()
    link = folder / CONFIG["output"] / "memory" / "outputs.json"
    link.write_text(link.read_text(encoding="utf-8").replace(f"{folder}/", ""), encoding="utf-8")


def _keep_the_end(folder: Path, end: Path, root: Path) -> None:
    """Keeps the weights, the steps and the memory's rows of the finished run."""
    end.mkdir()
    run = folder / CONFIG["output"]
    for name in ("model", "model-live"):
        shutil.copy(run / name / "model.safetensors", end / f"{name}.safetensors")
    shutil.copy(run / "metrics.jsonl", end / "metrics.jsonl")
    lines = ",\n".join(json.dumps(row) for row in memory_rows(folder, root=root))
    (end / "memory-rows.json").write_text(f"[{lines}]\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.equality.stopped_run", description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path, help="the folder to write; it must not be there yet")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout whose safecl is run; by default this one")
    arguments = parser.parse_args()
    make(arguments.root.resolve(), arguments.target)


if __name__ == "__main__":
    main()
