"""The identity of a run: its config, its rows, its base model. A folder that holds another run is refused; settings
that do not change what is trained or measured may differ."""

from __future__ import annotations

import json
from typing import Any

from safecl.config import ConfigError, RunConfig
from safecl.config.run import harmful_sources
from safecl.config.secrets import without_secrets
from safecl.engine.artifacts.base_model import fingerprint, versions
from safecl.engine.checkpoint.report import BaseModel
from safecl.planning.plans import RunPlan
from safecl.training.folder import RunFolder

HOW_TO_RESUME = "put it back to resume, or start a new run with another `output`"

MAY_DIFFER = (
    "output",
    "deepspeed",
    "teacher",
    "artifacts",
    "launch",
    "log",
    "checkpoint",
    "privacy",
    "model.path",
    "model.attention",
    "model.attention_check",
    "train.deterministic",
    "model.gradient_checkpointing",
    "tasks.*.train",
    "memory.source",
    "memory.prompts",
    "memory.benign_prompts",
    "memory.answers",
    "poison.source",
    "train.tokens_per_microbatch",
    "train.packing",
    "train.max_bad_rows",
    "train.max_skipped_steps",
    "train.allow_few_steps",
    "train.allow_little_memory",
    "train.hang_timeout",
    "safety.batch_size",
    "safety.gate",
)
"""Keys that may change between a stop and the resume: where things are, how they are computed, what is shown. Rows are
compared by content."""


def identity_of(plan: RunPlan, base: str | None = None) -> dict[str, Any]:
    """Return the identity that run.json and every checkpoint keep. base: hash of the base model's weights; None before
    the model is read."""
    return {
        "config": without_secrets(plan.config.model_dump(mode="json")),
        "rows": {task.config.name: fingerprint(task.dataset) for task in plan.tasks},
        "memory_rows": fingerprint(plan.memory) if plan.memory is not None else None,
        "harmful_rows": {name: fingerprint(plan.harmful[path]) for name, path in harmful_sources(plan.config).items()},
        "base": base,
        "versions": versions(),
    }


def refuse_folder_of_other_run(folder: RunFolder, plan: RunPlan) -> None:
    """Raise ConfigError where the run folder holds another run than the planned one."""
    if folder.holdings():
        refuse_other_run(folder.identity() or {}, identity_of(plan), str(folder.path))


def refuse_other_run(saved: dict[str, Any], now: dict[str, Any], where: str) -> None:
    """Raise ConfigError where two identities differ in what is trained or measured."""
    if "config" not in saved:
        raise ConfigError(
            f"{where} holds files of a run that cannot be compared with this one (its run.json is missing); "
            f"{HOW_TO_RESUME}"
        )
    refuse_other_config(saved["config"], now["config"], where)
    for name, rows in now["rows"].items():
        if saved["rows"].get(name) != rows:
            raise ConfigError(f"{where}: the rows of task {name} have changed since this run began; {HOW_TO_RESUME}")
    if saved["memory_rows"] != now["memory_rows"]:
        raise ConfigError(f"{where}: the rows of the memory have changed since this run began; {HOW_TO_RESUME}")
    for name, rows in now["harmful_rows"].items():
        if saved.get("harmful_rows", {}).get(name) != rows:
            raise ConfigError(
                f"{where}: the rows of methods.{name}.harmful have changed since this run began; {HOW_TO_RESUME}"
            )
    if None not in (saved["base"], now["base"]) and saved["base"] != now["base"]:
        raise ConfigError(f"{where}: the weights of model.path have changed since this run began; {HOW_TO_RESUME}")


def refuse_other_config(saved: dict[str, Any], now: dict[str, Any], where: str) -> None:
    """Raise ConfigError where two resolved configs differ in what is trained or measured; it names the keys."""
    if differences := different_keys(_completed(saved), now):
        shown = "".join(f"\n  {key}: {_short(old)} then, {_short(new)} now" for key, old, new in differences[:8])
        more = f"\n  and {len(differences) - 8} more" if len(differences) > 8 else ""
        raise ConfigError(f"{where} holds a run with another config; {HOW_TO_RESUME}:{shown}{more}")


def _completed(saved: dict[str, Any]) -> dict[str, Any]:
    """Give a saved config the defaults of keys that are newer than it; as it is where this safecl cannot read it."""
    try:
        return without_secrets(RunConfig.model_validate(saved).model_dump(mode="json"))
    except ValueError:
        return saved


def different_keys(saved: Any, now: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Return (key, saved, now) of all settings that differ and must not."""
    if _may_differ(path) or saved == now:
        return []
    if isinstance(saved, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*saved, *now])
        return [
            found for key in keys for found in different_keys(saved.get(key), now.get(key), f"{path}.{key}".lstrip("."))
        ]
    if isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        return [
            found
            for i, pair in enumerate(zip(saved, now, strict=True))
            for found in different_keys(*pair, f"{path}.{i}")
        ]
    return [(path, saved, now)]


def _may_differ(path: str) -> bool:
    return ".".join("*" if part.isdigit() else part for part in path.split(".")) in MAY_DIFFER


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def base_of(config: RunConfig, digest: str | None) -> BaseModel | None:
    """Return the base model, whose weights a checkpoint need not save; None with LoRA, which trains other weights."""
    return BaseModel(config.model.path, digest) if config.model.lora is None and digest is not None else None


def version_notes(saved: dict[str, str]) -> list[str]:
    """Return the note for a run that is resumed with other versions than before."""
    changed = [
        f"{name} {saved.get(name)} -> {version}" for name, version in versions().items() if saved.get(name) != version
    ]
    if not changed:
        return []
    return [f"other versions than before the stop ({', '.join(changed)}): results may differ in the last bits"]
