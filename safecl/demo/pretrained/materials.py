"""Writes the demonstration's files for a pretrained model: the model, data with its own answers, and run configs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safecl.demo.arms import PRETRAINED_ARMS, Arm
from safecl.demo.materials import Materials, write_config, write_rows
from safecl.demo.pretrained import model as smollm
from safecl.demo.pretrained.corpus import make_requests, rows_of
from safecl.demo.progress import Made, not_told

ALIGN_STEPS, TASK_STEPS = 50, 50
ANSWER_TOKENS = 40
"""Longest answer of the model to a harmless request that it is aligned with."""
CHECKPOINT = {"every": 10, "keep": 1}
NUM_PARAMETERS = 134_515_008
SHARE_OF_THE_MODEL = 0.65
"""Share of the materials that the model is; the others are its answers."""


def write_pretrained_materials(
    folder: str | Path,
    *,
    seed: int = 0,
    arms: Iterable[Arm] = PRETRAINED_ARMS,
    say: Callable[[str], None] = print,
    made: Made = not_told,
) -> Materials:
    """Write pretrained/, data/*.jsonl, align.yaml and <arm>.yaml. What is there and took long is used again.

    say: is told what is being done. made: is told how much of it is there. Raises ConfigError where the model cannot
    be had.
    """
    folder = Path(folder)
    base = smollm.fetch(
        folder, say, made=lambda share, *, earlier=False: made(SHARE_OF_THE_MODEL * share, earlier=earlier)
    )
    asked = make_requests(seed)
    write_rows(folder / "data", rows_of(asked, _own_answers(folder, base, asked.harmless, say, made)))
    align = write_config(folder / "align.yaml", align_config(folder, seed))
    configs = {arm.name: write_config(folder / f"{arm.name}.yaml", arm_config(folder, arm, seed)) for arm in arms}
    return Materials(folder, base, align, configs, NUM_PARAMETERS)


def _own_answers(
    folder: Path, base: Path, requests: list[str], say: Callable[[str], None], made: Made
) -> list[dict[str, Any]]:
    """Return the model's answers, which are made once."""
    path = folder / "own-answers.json"
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["requests"] == requests:
            made(1.0, earlier=True)
            return list(found["answers"])
    say("asking the model for its own answers")
    answers = smollm.answers(
        base,
        requests,
        max_new_tokens=ANSWER_TOKENS,
        made=lambda share, **_: made(SHARE_OF_THE_MODEL + (1 - SHARE_OF_THE_MODEL) * share),
    )
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"requests": requests, "answers": answers}), encoding="utf-8")
    partial.replace(path)
    return answers


def align_config(folder: Path, seed: int) -> dict[str, Any]:
    """Return the config that aligns the pretrained model: refusals, and its own answers to harmless requests."""
    return {
        "model": _model(folder / "pretrained"),
        "tasks": [{"name": "alignment", "train": str(folder / "data/align.jsonl"), "role": "align"}],
        "train": _train(seed, max_steps=ALIGN_STEPS, tokens_per_batch=700, allow_few_steps=True),
        "deepspeed": {"stage": 2},
        "safety": _safety(folder) | {"every": "never"},
        "checkpoint": CHECKPOINT,
        "log": {"every": 20},
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
        "memory": {"source": str(data / "memory.jsonl"), "replay_ratio": 0.25, "max_tokens": 128, "teacher": {"k": 64}},
        "methods": arm.methods,
        "train": _train(seed, max_steps=TASK_STEPS, tokens_per_batch=600),
        "deepspeed": {"stage": 2},
        "safety": _safety(folder),
        "checkpoint": CHECKPOINT,
        "artifacts": {"folder": str(folder / "artifacts")},
        "log": {"every": 20},
        "output": str(folder / arm.name),
    }
    if arm.poison > 0:
        config["poison"] = {"ratio": arm.poison, "source": str(data / "poison.jsonl"), "seed": seed}
    return config


def _model(path: Path) -> dict[str, Any]:
    return {"path": str(path), "gradient_checkpointing": False}


def _train(seed: int, **settings: Any) -> dict[str, Any]:
    return settings | {"learning_rate": 1e-4, "tokens_per_microbatch": 2048, "max_length": 128, "seed": seed}


def _safety(folder: Path) -> dict[str, Any]:
    data = folder / "data"
    prompts = {"prompts": str(data / "safety-prompts.jsonl"), "benign_prompts": str(data / "benign-prompts.jsonl")}
    return prompts | {"max_new_tokens": 24, "batch_size": 30}
