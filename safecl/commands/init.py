"""`safecl init`: asks up to six questions and writes a commented config. The comments are the config's own
documentation (safecl/config/docs.py)."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import typer

from safecl.config import ConfigError, parse_yaml
from safecl.config.docs import EXAMPLES, starter_yaml
from safecl.terminal import Terminal

HEADER = """\
# A safecl run. Commented keys show their default or an example.
#   safecl check {file}    what would run; reads all data, trains nothing
#   safecl train {file}    one process; several: torchrun --nproc-per-node N -m safecl train {file}
# All keys: docs/config.md, or `safecl init --all`.

"""


def init_config(
    output: Path,
    *,
    model: str | None,
    train_file: str | None,
    memory: str | None,
    memory_prompts: str | None,
    safety_prompts: str | None,
    untrusted: bool | None,
    every_key: bool,
) -> None:
    """Ask on a terminal for what is not given, and write `output`. Raises ConfigError where the file exists or cannot
    be written."""
    if output.exists():
        raise ConfigError(f"{output}: exists and is not overwritten; write another file with --output, or remove it")
    model = model or _ask("Model (a Hugging Face folder or hub id)", str(EXAMPLES["model.path"]))
    train_file = train_file or _ask(
        "Training rows (.jsonl, .json, .csv, .parquet or a hub id)", str(EXAMPLES["tasks.train"])
    )
    if memory_prompts is None:
        memory = memory or _ask("Disallowed prompts with the refusals to keep (a file, or none)", "none")
    if memory in (None, "none"):
        memory_prompts = memory_prompts or _ask(
            "Disallowed prompts alone, to which the model writes its refusals itself (a file, or none)", "none"
        )
    safety_prompts = safety_prompts or _ask("Other disallowed prompts to measure safety with (a file, or none)", "none")
    kept, asked, prompts = (None if name == "none" else name for name in (memory, memory_prompts, safety_prompts))
    if kept and asked:
        raise ConfigError("--memory has refusals, and the model writes its own for --memory-prompts; leave one out")
    if untrusted is None and (kept or asked):
        untrusted = (
            _ask("May somebody have poisoned the training rows (uploads of others)? yes or no", "no")[:1] in "yY"
        )
    values = starter_values(model, train_file, kept, prompts, memory_prompts=asked, untrusted=bool(untrusted))
    text = HEADER.format(file=output) + starter_yaml(values, every_key)
    assert parse_yaml(text)["model"]["path"] == model
    _write(output, text)
    Terminal().print(f"wrote {output}; next: safecl check {output}")


def starter_values(
    model: str,
    train_file: str,
    memory: str | None,
    safety_prompts: str | None,
    *,
    memory_prompts: str | None = None,
    untrusted: bool = False,
) -> dict[str, Any]:
    """Return the keys that a starter sets: the answers, the preset that fits, and the sizes that people change first.

    memory: file of refusals to keep; memory_prompts: of disallowed prompts in its place, which the model answers.

    Where there are prompts that the model is known to refuse, the upload is screened. Flagged rows are only listed:
    without known harmless rows to compare with, a third of an honest upload may be flagged, and a default must not
    drop rows.
    """
    name = re.sub(r"[^\w.-]+", "-", Path(train_file).stem).strip("-.") or EXAMPLES["tasks.name"]
    values: dict[str, Any] = {
        "model": {"path": model},
        "tasks": [{"name": name, "train": train_file}],
        "methods": ("strict" if untrusted else "balanced") if memory or memory_prompts else "no-data",
        "train": {"epochs": 3.0, "learning_rate": 2e-5},
        "deepspeed": {"stage": 2},
        "output": f"runs/{name}",
    }
    if memory or memory_prompts:
        rows = {"source": memory} if memory else {"prompts": memory_prompts}
        values["memory"] = {**rows, "replay_ratio": 0.25}
    if safety_prompts:
        values["safety"] = {"prompts": safety_prompts}
    if memory or memory_prompts or safety_prompts:
        values["scan"] = {"action": "report"}
    return values


def _ask(question: str, default: str) -> str:
    return typer.prompt(question, default=default) if sys.stdin.isatty() and sys.stdout.isatty() else default


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
