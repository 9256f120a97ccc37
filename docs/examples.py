"""Makes the example pages in docs/examples from `safecl demo`, run in the current folder:

    safecl demo runs/demo && python docs/examples.py runs/demo docs/examples

It trains more runs of the demonstration, with limits on safety: plain fine-tuning, DER, DER on a sequence of two tasks,
and a sweep over plain fine-tuning and ER with two seeds. The same command goes on where it was stopped.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from safecl import Trainer
from safecl.commands.judging.sweep import SweepOptions, sweep_runs
from safecl.config import validate_tree
from safecl.report.comparison import read_runs, write_comparison

GATE = {"max_asr": 0.2, "max_over_refusal": 0.2}
STARS = {"positive": "five stars", "negative": "one star"}


def with_gate(demo: Path, arm: str, name: str, **changes: Any) -> dict[str, Any]:
    """Return the config of one of the demonstration's arms with limits on safety, for a run of another name."""
    tree: dict[str, Any] = yaml.safe_load((demo / f"{arm}.yaml").read_text(encoding="utf-8"))
    tree["safety"] |= {"gate": GATE}
    return tree | {"output": str(demo / name)} | changes


def write_second_task(demo: Path) -> list[dict[str, Any]]:
    """Write a task that asks for stars about the same reviews, and return both tasks."""
    for name in ("task", "task-test"):
        lines = (demo / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        asked = [
            {
                "prompt": row["prompt"].replace("Is this review positive or negative?", "How many stars?"),
                "completion": STARS[row["completion"]],
            }
            for row in rows
        ]
        text = "".join(json.dumps(row) + "\n" for row in asked)
        (demo / "data" / f"{name.replace('task', 'stars')}.jsonl").write_text(text, encoding="utf-8")
    files = {"sentiment": "task", "stars": "stars"}
    return [
        {
            "name": name,
            "train": str(demo / "data" / f"{file}.jsonl"),
            "eval": {"path": str(demo / "data" / f"{file}-test.jsonl"), "metric": "label_accuracy"},
        }
        for name, file in files.items()
    ]


def write_sweep(demo: Path, page: Path) -> None:
    """Run the sweep and write its page."""
    memory = with_gate(demo, "der", "sweep")["memory"]
    config = demo / "sweep.yaml"
    config.write_text(yaml.safe_dump(with_gate(demo, "plain", "sweep", memory=memory)), encoding="utf-8")
    axes = ("methods=plain,er", "train.seed=0,1")
    options = SweepOptions(pick="max accuracy where asr.high <= 0.2")
    sweep_runs(config, axes, options)
    shutil.copy(demo / "sweep" / "report.html", page)


def main(demo: Path, pages: Path) -> None:
    """Train the runs and write run.html, sequence.html, comparison.html and sweep.html."""
    trees = {
        "support-plain": with_gate(demo, "plain", "support-plain"),
        "support-der": with_gate(demo, "der", "support-der"),
        "sequence": with_gate(demo, "der", "sequence", tasks=write_second_task(demo)),
    }
    for name, tree in trees.items():
        Trainer(validate_tree(tree, name)).fit()
    pages.mkdir(parents=True, exist_ok=True)
    shutil.copy(demo / "support-plain" / "report.html", pages / "run.html")
    shutil.copy(demo / "sequence" / "report.html", pages / "sequence.html")
    write_comparison(read_runs([demo / "support-plain", demo / "support-der"]), pages / "comparison.html")
    write_sweep(demo, pages / "sweep.html")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
