"""Files and models that single arms of benchmarks/retention/run.py cannot do without, made when the first such arm
begins."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from benchmarks.retention import real_data
from benchmarks.retention.arms import PLAIN, TUNING_SEED, Run

Train = Callable[[Path, str, dict], None]
NUM_TUNING_PROMPTS = 80
STEPS = 100
"""Steps of each of the two models that TOSS compares."""


def make(folder: Path, run: Run, train: Train) -> None:
    """Make what `run` needs and `folder` lacks.

    train: trains a config, its folder being the first two arguments.
    """
    if run.seed == TUNING_SEED and not (folder / "prompts-tuning.jsonl").exists():
        tuning_prompts(folder)
    for word, path in run.files(folder).items():
        if run.needs(word) and not path.exists():
            MAKERS[word](folder, run, path, train)


def tuning_prompts(folder: Path) -> None:
    """Set prompts of the poison aside, on which settings are chosen, and write the poison without them."""
    rows = real_data.lines_of(folder / "poison.jsonl")
    every = max(2, len(rows) // NUM_TUNING_PROMPTS)
    prompts = [{"prompt": row["messages"][0]["content"]} for row in rows[::every]][:NUM_TUNING_PROMPTS]
    prompts_file, poison_file = folder / "prompts-tuning.jsonl", folder / "poison-tuning.jsonl"
    aside = {prompt["prompt"] for prompt in prompts}
    real_data.write_rows(prompts_file, prompts)
    real_data.write_rows(poison_file, [row for row in rows if row["messages"][0]["content"] not in aside])
    real_data.drop_overlaps(poison_file, [prompts_file])


def harmful_rows(folder: Path, run: Run, path: Path, train: Train) -> None:
    """Write the memory's prompts with answers that comply: a defender's harmful rows, none of them the attacker's."""
    real_data.write_rows(path, [real_data.complying(row) for row in real_data.lines_of(folder / "memory.jsonl")])


def expanded_model(folder: Path, run: Run, path: Path, train: Train) -> None:
    """Write the aligned model with one block more, behind its last."""
    from safecl.engine.model.expansion import expand_folder

    expand_folder(str(folder / "aligned" / "model"), path, 1)


def degraded_model(folder: Path, run: Run, path: Path, train: Train) -> None:
    """Train the aligned model on the defender's harmful rows."""
    harmful = run.files(folder)["HARMFUL"]
    if not harmful.exists():
        harmful_rows(folder, run, harmful, train)
    _train_on(folder, path, {"name": "harmful", "train": str(harmful)}, train)


def useful_model(folder: Path, run: Run, path: Path, train: Train) -> None:
    """Train the aligned model on rows of SST-2 that no arm trains or measures."""
    task = real_data.sst2_task(fields=real_data.sst2_fields(real_data.SHORT_PROMPT))
    _train_on(folder, path, task | {"train": str(real_data.data_folder() / "sst2_dev.jsonl")}, train)


def _train_on(folder: Path, model: Path, task: dict, train: Train) -> None:
    config = Run(PLAIN, "sst2", 0, 0).config(folder)
    config["train"] |= {"max_steps": STEPS}
    name = model.parent.name
    train(folder, name, config | {"tasks": [task], "output": str(folder / name)})


def rewritten_answers(folder: Path, run: Run, path: Path, train: Train) -> None:
    """Let the aligned model rewrite the answers of the run's rows."""
    from safecl.distributed.environment import without_launcher

    config = Run(PLAIN, run.task, run.poison, run.seed).config(folder)
    written = path.with_suffix(".yaml")
    written.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    command = ["memory", "rewrite", str(written), "--max-new-tokens", "64", "--batch-size", "64", "-o", str(path)]
    with path.with_suffix(".log").open("w", encoding="utf-8") as log:
        subprocess.run(
            [sys.executable, "-m", "safecl", *command], stdout=log, stderr=log, check=True, env=without_launcher()
        )


MAKERS: dict[str, Callable[[Path, Run, Path, Train], None]] = {
    "HARMFUL": harmful_rows,
    "EXPANDED": expanded_model,
    "DEGRADED": degraded_model,
    "USEFUL": useful_model,
    "ANSWERS": rewritten_answers,
}
