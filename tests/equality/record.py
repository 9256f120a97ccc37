"""Writes down all that some small runs leave, or compares them with what was written down: the check of bit equality.

    python -m tests.equality.record --out before.json        before the change
    python -m tests.equality.record --compare before.json    after it; exit code 1 where something differs

The bits depend on the machine and on the versions of its libraries, so a recording is only good where it was made.
`--root DIR` takes the safecl of another checkout.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.equality.contents import contents_of
from tests.equality.materials import write_materials
from tests.equality.memory import exported_rows
from tests.equality.ranks import CACHE, ROOT, run_safecl

MOST_SHOWN = 20
FACTS = ("kernels", "versions")
MODEL = {"path": "base", "dtype": "fp32", "gradient_checkpointing": False}
TRAIN = {
    "max_steps": 10, "tokens_per_batch": 120, "tokens_per_microbatch": 64, "max_length": 32, "learning_rate": 5e-3,
    "seed": 3, "allow_few_steps": True,
}  # fmt: skip
FIRST = {
    "name": "first",
    "train": "data/first.jsonl",
    "eval": {"path": "data/held-out.jsonl", "metric": "answer_nll"},
}
SECOND = {"name": "second", "train": "data/second.jsonl"}

RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (
        1,
        {
            "model": MODEL,
            "tasks": [FIRST],
            "train": TRAIN | {"packing": "packed"},
            "deepspeed": {"stage": 0},
            "checkpoint": {"every": 4},
        },
    ),
    "replay": (
        2,
        {
            "model": MODEL,
            "tasks": [FIRST, SECOND],
            "memory": {
                "source": "data/memory.jsonl", "replay_ratio": 0.5, "max_tokens": 24, "keep_task_rows": 6,
                "teacher": {"k": 8},
            },
            "methods": {
                "der": {"alpha": 1.0, "beta": 0.5},
                "ewc": {"strength": 1.0, "sign_batches": 4, "rows_per_batch": 4},
                "ema": {"decay": 0.7},
            },
            "train": TRAIN,
            "deepspeed": {"stage": 3},
            "safety": {"prompts": "data/prompts.jsonl", "max_new_tokens": 6},
            "checkpoint": {"every": 8},
        },
    ),
    "memory": (
        1,
        {
            "model": MODEL,
            "tasks": [FIRST, SECOND],
            "memory": {
                "source": "data/memory.jsonl", "replay_ratio": 0.5, "max_tokens": 24, "keep_task_rows": 6,
                "capacity": 20, "policy": "balanced", "draw": "mix_cd", "rest_steps": 1,
                "teacher": {"k": 8, "indices": "packed"},
            },
            "methods": {"derpp": {}, "ema": {"write_back": "slow", "decay": 0.5, "every": 3}},
            "train": TRAIN,
            "deepspeed": {"stage": 1},
            "checkpoint": {"every": 8},
        },
    ),
    "lora": (
        2,
        {
            "model": {"path": "base", "dtype": "bf16", "lora": {"r": 2, "alpha": 4, "dropout": 0.1}},
            "tasks": [FIRST],
            "methods": {"l2_sp": {"strength": 0.1}},
            "train": TRAIN | {"packing": "padded"},
            "deepspeed": {"stage": 2},
            "checkpoint": {"every": 8},
        },
    ),
}  # fmt: skip
"""By name: the number of ranks and the run config without its `output`."""


def record(root: Path, folder: Path) -> dict[str, Any]:
    """Trains all runs with the safecl of the checkout `root` inside an empty folder, and returns what they leave."""
    write_materials(folder)
    found: dict[str, Any] = {"machine": _machine(root, folder), "runs": {}}
    for name, (ranks, config) in RUNS.items():
        found["runs"][name] = _train(root, folder, name, ranks, config)
        print(f"{name}: {len(found['runs'][name]['run/metrics.jsonl'])} steps", flush=True)
    found["prepared rows"] = contents_of(folder / CACHE, below=folder)
    return found


def _machine(root: Path, folder: Path) -> dict[str, Any]:
    """The parts of `safecl env` that decide the last bits."""
    ended = run_safecl(["env", "--json"], folder, root=root)
    facts = json.loads(ended.said[ended.said.index("{") :])
    facts["versions"].pop("safecl")
    return {title: facts[title] for title in FACTS}


def _train(root: Path, folder: Path, name: str, ranks: int, config: dict[str, Any]) -> dict[str, Any]:
    """Runs one config; its artifacts and its run folder lie in a folder of the run's name."""
    places = {"artifacts": {"folder": f"{name}/artifacts"}, "output": f"{name}/run"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config | places, sort_keys=False), encoding="utf-8")
    ended = run_safecl(["train", f"{name}.yaml"], folder, ranks=ranks, root=root)
    if any(ended.codes):
        sys.exit(f"{name}: exit codes {ended.codes}\n{ended.said}")
    found = contents_of(folder / name, below=folder, ranks=ranks)
    if "memory" in config:
        found["memory rows"] = [
            f"{row['row_id']} {row['task']} {hashlib.sha256(json.dumps(row).encode()).hexdigest()}"
            for row in exported_rows(folder, f"{name}/run", root)
        ]
    return found


def differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """One line per field that differs, in the order of `before`."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            yield from differences(before.get(key), after.get(key), f"{path} > {key}" if path else key)
    elif isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            yield f"{path}: {len(before)} entries before, {len(after)} after"
        for number, (one, other) in enumerate(zip(before, after, strict=False)):
            yield from differences(one, other, f"{path}[{number}]")
    elif before != after:
        yield f"{path}: {before!r} before, {after!r} after"


def compare(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Prints what differs, the first field first; returns the exit code."""
    found = list(differences(before, after))
    for line in found[:MOST_SHOWN]:
        print(line)
    print(f"{len(found)} fields differ" if found else "every field is equal")
    return 1 if found else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.equality.record", description=__doc__.splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, help="write a recording to this file")
    action.add_argument("--compare", type=Path, help="compare with the recording in this file")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout whose safecl is run; by default this one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = record(arguments.root.resolve(), Path(folder).resolve())
    if arguments.compare is not None:
        return compare(json.loads(arguments.compare.read_text(encoding="utf-8")), found)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
