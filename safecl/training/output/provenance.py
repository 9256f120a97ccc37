"""Facts of a run for an auditor, as they stand in results.json: hashes of weights and rows, poison and screening of
this run, seeds, prompts and scorers. They hold no text of rows, and file names instead of paths."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from safecl.config import ConfigError
from safecl.engine.artifacts.base_model import model_hash
from safecl.evaluation.provenance import measured_with
from safecl.planning.plans import RunPlan, TaskPlan
from safecl.report.card import file_name, model_name
from safecl.storage.model_folder import tuned_model
from safecl.training.steps.state import RunState


def provenance_of(run: RunState, plan: RunPlan, identity: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the facts. identity: see safecl.training.identity. folder: the run folder, with the saved weights.

    The hashes of models are XXH3-128 over config.json and the weights' files, and those of rows XXH3-128 over the
    prepared rows (safecl.engine.artifacts.base_model).
    """
    config = plan.config
    model = tuned_model(folder)
    seeds = {"train": config.train.seed} | ({"poison": config.poison.seed} if config.poison.ratio else {})
    memory = config.memory
    return {
        "base_model": {"path": model_name(config.model.path), "xxh3_128": identity["base"]},
        "model": {"folder": model.name, "xxh3_128": _hash_of(model)} if model is not None else None,
        "data": [_of_task(run, task, identity["rows"][task.config.name]) for task in plan.tasks],
        "memory": {"file": file_name(memory.origin), "rows": len(plan.memory), "xxh3_128": identity["memory_rows"]}
        if memory is not None and plan.memory is not None
        else None,
        "screened": config.scan.action if config.scan is not None else None,
        "seeds": seeds,
        "measured_with": measured_with(plan.tokenizer, config.model, config.safety, plan.prompts, plan.benign),
        "versions": identity["versions"],
    }


def _hash_of(model: Path) -> str | None:
    """Hash the weights; None where they cannot be read: a run that is done does not fail for its hash."""
    with contextlib.suppress(OSError, ConfigError):
        return model_hash(str(model))
    return None


def _of_task(run: RunState, task: TaskPlan, digest: str) -> dict[str, Any]:
    """Return the rows of a task: those in its file, those left out and why, those trained on and their hash."""
    upload = task.dataset.reports[0]  # poison comes behind it
    decision = run.screening.get(task.config.name)
    return {
        "task": task.config.name,
        "role": task.config.role,
        "file": file_name(task.config.train),
        "rows": len(task.dataset),
        "xxh3_128": digest,
        "rows_in_file": upload.seen,
        "bad": upload.bad,
        "truncated": upload.truncated,
        "poisoned": task.poisoned_rows,
        "repeated": task.repeated_rows,
        "flagged": None if decision is None else {"rows": len(decision["rows"]), "weight": decision["weight"]},
    }
