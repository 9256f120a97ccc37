"""Whole runs of the trainer on a device, with `train.deterministic`: one that nobody disturbs, and one that a signal
stops and that is resumed. They must leave the same bytes: models, metrics, answers and results.

    python launch/whole_run.py --device cuda --out run.json

The demonstration's random model in bf16 under ZeRO-2, with reference, Fisher and average in host memory: an alignment
task and one with EWC, EMA and DER, evaluations between steps, and a checkpoint every second step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
STOPPED = 75
"""The exit code of a run that a signal has stopped."""
STEP = 7
"""The step, of ten, before whose end the signal comes: in the second task, between two checkpoints."""
PROMPTS = 3


def write_materials(folder: Path) -> None:
    """Write the demonstration's data and random model, with few evaluation prompts."""
    from safecl.demo import materials

    materials.write_materials(folder)
    for name in ("safety-prompts.jsonl", "task-test.jsonl"):
        path = folder / "data" / name
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[:PROMPTS]), encoding="utf-8")


def config_of(folder: Path, output: Path) -> dict[str, Any]:
    """Return the config of a run on the materials in `folder`."""
    from tests.distributed.test_stopping import tree

    config = tree(folder, output)
    config["model"] |= {"dtype": "bf16"}
    config["train"] |= {"deterministic": True}
    config["deepspeed"] |= {"offload": {"reference": "cpu", "fisher": "cpu", "ema": "cpu"}}
    return config


def train(path: str, stop: int | None) -> int:
    """Train by the config file in this process, and return the exit code. stop: the step in which the signal comes."""
    from safecl.commands.train import train_run
    from safecl.config import load_config
    from tests.distributed.stop_scenes import stopping

    signal = stopping(rank=0, name="SIGTERM", step=stop) if stop is not None else contextlib.nullcontext()
    with signal:
        return int(train_run(load_config(path)))


def start(device: str, folder: Path, name: str, stop: int | None = None) -> subprocess.Popen[bytes]:
    """Start a process that trains the run of this name, each run with artifacts of its own."""
    import yaml

    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(config_of(folder, folder / name)), encoding="utf-8")
    command = [sys.executable, __file__, "--device", device, "--train", str(config)]
    command += ["--stop", str(stop)] if stop is not None else []
    environment = {"OMP_NUM_THREADS": "2", **os.environ, "DS_ACCELERATOR": device}
    return subprocess.Popen(command, cwd=ROOT, env={**environment, "SAFECL_CACHE": str(folder / f"cache-{name}")})


def compare(device: str) -> dict[str, Any]:
    """Make both runs; return the exit codes, and the files and lines in which what they leave differs."""
    from tests.distributed.test_stopping import what_is_left

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_materials(folder)
        processes = [start(device, folder, "whole"), start(device, folder, "stopped", STEP)]  # side by side
        codes = [process.wait() for process in processes]
        if codes == [0, STOPPED]:
            codes.append(start(device, folder, "stopped").wait())
        if codes != [0, STOPPED, 0]:
            return {"exit_codes": codes, "differences": ["the runs did not end as they should"], "compared": 0}
        whole, resumed = (what_is_left(folder / name) for name in ("whole", "stopped"))
        checkpoints = len(list((folder / "stopped" / "checkpoints").glob("step-*")))
    return {
        "exit_codes": codes,
        "checkpoints": checkpoints,
        "compared": sum(len(part) for part in whole.values()),
        "differences": list(differences(whole, resumed)),
    }


def differences(whole: dict[str, Any], resumed: dict[str, Any]) -> list[str]:
    """Return the names of all that differs, such as `models/model/model.safetensors` or `metrics/3`."""
    found = []
    for part, content in whole.items():
        entries, others = (dict(enumerate(c)) if isinstance(c, list) else c for c in (content, resumed[part]))
        found += [f"{part}/{key}" for key in {**entries, **others} if entries.get(key) != others.get(key)]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--stop", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if options.train:
        return train(options.train, options.stop)
    found = compare(options.device)
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))
    return 1 if found["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())
