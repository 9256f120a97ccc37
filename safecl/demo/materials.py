"""Writes the demonstration's files into a folder: data, the random model, and one run config per arm. The files depend
on the seed alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from safecl.demo.arms import ARMS, Arm
from safecl.demo.corpus import Rows, make_corpus, texts

CHECKPOINT = {"every": 40, "keep": 1}
ALIGN_STEPS = 200
TASK_STEPS = 80


@dataclass(frozen=True)
class Materials:
    """The files of `write_materials`. Paths are relative where `folder` is."""

    folder: Path
    random_model: Path
    """The model before its alignment: random, or pretrained."""
    align_config: Path
    arm_configs: dict[str, Path]
    """Config files by arm name."""
    num_parameters: int

    @property
    def aligned_model(self) -> Path:
        """Model folder of the alignment run: the model that all arms start from."""
        return self.folder / "aligned" / "model"


def write_materials(folder: str | Path, *, seed: int = 0, arms: Iterable[Arm] = ARMS) -> Materials:
    """Write data/*.jsonl, random-model/, align.yaml and <arm>.yaml. Existing files are written again with the same
    content."""
    from safecl.demo.model import save_random_model

    folder = Path(folder)
    corpus = make_corpus(seed)
    write_rows(folder / "data", {name.replace("_", "-"): rows for name, rows in asdict(corpus).items()})
    num_parameters = save_random_model(folder / "random-model", texts(corpus), seed=seed)
    align = write_config(folder / "align.yaml", align_config(folder, seed))
    configs = {arm.name: write_config(folder / f"{arm.name}.yaml", arm_config(folder, arm, seed)) for arm in arms}
    return Materials(folder, folder / "random-model", align, configs, num_parameters)


def align_config(folder: Path, seed: int) -> dict[str, Any]:
    """Return the config that trains the random model on the alignment corpus, so that it refuses."""
    return {
        "model": _model(folder / "random-model"),
        "tasks": [{"name": "alignment", "train": str(folder / "data/align.jsonl"), "role": "align"}],
        "train": _train(seed, max_steps=ALIGN_STEPS, tokens_per_batch=512, learning_rate=3e-3),
        "deepspeed": {"stage": 2},
        "safety": _safety(folder),
        "checkpoint": CHECKPOINT,
        "log": {"every": 50},
        "output": str(folder / "aligned"),
    }


def arm_config(folder: Path, arm: Arm, seed: int) -> dict[str, Any]:
    """Return the config that fine-tunes the aligned model on the user's task with the methods of one arm."""
    data = folder / "data"
    task = {
        "name": "sentiment",
        "train": str(data / "task.jsonl"),
        "eval": {"path": str(data / "task-test.jsonl"), "metric": "label_accuracy"},
    }
    config = {
        "model": _model(folder / "aligned" / "model"),
        "tasks": [task],
        "memory": {"source": str(data / "memory.jsonl"), "replay_ratio": 0.5, "max_tokens": 96, "teacher": {"k": 32}},
        "methods": arm.methods,
        "train": _train(seed, max_steps=TASK_STEPS, tokens_per_batch=320, learning_rate=2e-3),
        "deepspeed": {"stage": 2},
        "safety": _safety(folder),
        "checkpoint": CHECKPOINT,
        "artifacts": {"folder": str(folder / "artifacts")},
        "log": {"every": 40},
        "output": str(folder / arm.name),
    }
    if arm.poison > 0:
        config["poison"] = {"ratio": arm.poison, "source": str(data / "poison.jsonl"), "seed": seed}
    return config


def _model(path: Path) -> dict[str, Any]:
    return {"path": str(path), "dtype": "fp32", "gradient_checkpointing": False}


def _train(seed: int, **settings: Any) -> dict[str, Any]:
    return settings | {"tokens_per_microbatch": 4096, "max_length": 96, "seed": seed}


def _safety(folder: Path) -> dict[str, Any]:
    data = folder / "data"
    prompts = {"prompts": str(data / "safety-prompts.jsonl"), "benign_prompts": str(data / "benign-prompts.jsonl")}
    return prompts | {"max_new_tokens": 24, "batch_size": 60}


def write_rows(folder: Path, rows_by_name: Mapping[str, Rows]) -> None:
    """Write a file of JSON lines for each name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in rows_by_name.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def write_config(path: Path, config: dict[str, Any]) -> Path:
    """Write a run config with a line that says how to run it alone."""
    header = "# Written by `safecl demo`. Run it alone with: safecl train " + str(path) + "\n"
    path.write_text(header + yaml.safe_dump(config, sort_keys=False, width=120), encoding="utf-8")
    return path
