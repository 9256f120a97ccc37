"""CPU seconds of `safecl check`, for a model that it sees first and for one that it has checked before.

    python -m benchmarks.planning.check_time                # the demonstration's random model; a minute
    python -m benchmarks.planning.check_time MODEL          # a folder, such as SmolLM2-135M-Instruct; renews no page

first   an empty cache: rows are tokenised, the model is read
again   the same config, the least of some
longer  the same with four times the rows, which lie prepared

Each check is a process of its own; its seconds are those of the process and its children, user and system. Rows are
made up, torch uses one thread, and there is no error column. Writes benchmarks/results/check_time.json and a table of
docs/start.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks import ROOT
from benchmarks.harness import machine, renew_page, write_json

RESULT = ROOT / "benchmarks" / "results" / "check_time.json"
WORDS = "the cat reads a long book about seven rivers and writes down what it has seen on the way home".split()
ROWS, LONGER, TIMES = 1500, 6000, 5
TITLES = {
    "first": f"first check of the model, {ROWS:,} rows",
    "again": "second check",
    "longer": f"second check, {LONGER:,} rows",
}


def write_config(folder: Path, model: str, rows: int) -> Path:
    """Write rows of about 25 words and a config that trains on them."""
    rng = random.Random(0)
    lines = ({"prompt": " ".join(rng.choices(WORDS, k=20)), "completion": rng.choice(WORDS)} for _ in range(rows))
    (folder / f"rows-{rows}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tree = {
        "model": {"path": model},
        "tasks": [{"name": "task", "train": str(folder / f"rows-{rows}.jsonl")}],
        "train": {"max_steps": 60, "tokens_per_batch": 600, "tokens_per_microbatch": 2048, "max_length": 128},
        "output": str(folder / "run"),
    }
    path = folder / f"{rows}.yaml"
    path.write_text(json.dumps(tree))
    return path


def check(config: Path, cache: Path) -> float:
    """Check a config in a process; return the CPU seconds. Raises CalledProcessError."""
    before = _seconds_of_children()
    command = [sys.executable, "-m", "safecl", "check", str(config)]
    environment = os.environ | {"SAFECL_CACHE": str(cache)}
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=environment)
    return round(_seconds_of_children() - before, 2)


def _seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(folder: Path, model: str) -> list[dict]:
    """Return the CPU seconds of each kind of check: the least, and all."""
    found = []
    few, many = write_config(folder, model, ROWS), write_config(folder, model, LONGER)
    for kind, config in {"first": few, "again": few, "longer": many}.items():
        caches = [folder / (f"cache-{number}" if kind == "first" else "cache-0") for number in range(TIMES)]
        if kind == "longer":
            check(config, caches[0])
        seconds = [check(config, cache) for cache in caches]
        found.append({"check": kind, "seconds": min(seconds), "all_seconds": seconds})
        print(json.dumps(found[-1]), flush=True)
    return found


def table(found: list[dict]) -> str:
    lines = ["| | CPU seconds |", "|---|---|"]
    lines += [f"| {TITLES[one['check']]} | {one['seconds']:.1f} |" for one in found]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a model folder; the demonstration's random model by default")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if chosen.model is None:
            from safecl.demo.materials import write_materials

            model = str(write_materials(folder / "demo").random_model)
        else:
            model = str(Path(chosen.model).absolute())
        found = measure(folder, model)
    print(table(found))
    if chosen.model is None:
        command = "python -m benchmarks.planning.check_time"
        write_json(RESULT, {"machine": machine(torch.device("cpu")), "command": command, "checks": found})
        renew_page(ROOT / "docs" / "start.md", {"check-time": table(found)})


if __name__ == "__main__":
    main()
