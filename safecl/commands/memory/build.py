"""`safecl memory build MODEL PROMPTS`: lets the aligned model write the memory's rows, and caches its outputs on them.
Any number of ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safecl.commands.memory.cache import ranks
from safecl.config import ConfigError, RunConfig, apply_overrides, validate_tree
from safecl.distributed import environment

if TYPE_CHECKING:
    from safecl.data import Prompt
    from safecl.engine.artifacts.memory_rows import MemoryRows, RowSettings
    from safecl.training.output.console import Console


def build_rows(
    model: str,
    prompts: str,
    benign: str | None,
    output: Path | None,
    max_prompts: int | None,
    settings: dict[str, Any],
    overrides: list[str],
) -> None:
    """Build what is missing, and print what was kept and where. Raises ConfigError, before the model is loaded where
    possible.

    output: file for a copy of the rows. settings: fields of RowSettings. overrides: `key=value` of a run config.
    """
    environment.join_launcher()
    config = _config(model, prompts, overrides)
    from safecl.data import load_tokenizer, read_prompts
    from safecl.data.reading.files import refuse_missing
    from safecl.data.templates.thinking import check_thinking
    from safecl.engine.artifacts.memory_rows import RowSettings
    from safecl.evaluation.answers.folders import check_is_model
    from safecl.evaluation.scoring.judges import load_scorer

    check_is_model(model)
    for path in (prompts, benign):
        if path is not None:
            refuse_missing(path)
    load_scorer(settings["scorer"])
    disallowed = read_prompts(prompts, max_prompts)
    harmless = read_prompts(benign, max_prompts, only_safe=True) if benign is not None else []
    tokenizer = load_tokenizer(config.model)
    check_thinking(tokenizer)
    with ranks(Path(config.output)):
        _build(config, tokenizer, disallowed, harmless, RowSettings(**settings), output)


def _config(model: str, prompts: str, overrides: list[str]) -> RunConfig:
    """Make the run config that the engine needs, from the model, the prompts and the overrides. Nothing is trained."""
    tree = {
        "model": {"path": model},
        "tasks": [{"name": "memory", "train": prompts}],
        "memory": {"source": prompts},
        "output": "runs",
    }
    return validate_tree(apply_overrides(tree, overrides), "safecl memory build")


def _build(
    config: RunConfig,
    tokenizer: Any,
    prompts: list[Prompt],
    benign: list[Prompt],
    settings: RowSettings,
    output: Path | None,
) -> None:
    from safecl.data.config_rows import prepare_memory
    from safecl.engine.artifacts.base_model import base_key
    from safecl.engine.artifacts.memory_rows import memory_rows
    from safecl.engine.artifacts.store import ArtifactStore
    from safecl.engine.artifacts.teacher_outputs import shared_outputs
    from safecl.engine.passes.forward_engine import forward_engine_of
    from safecl.training.output.console import Console

    assert config.memory is not None
    console, store = Console(1, environment.rank()), ArtifactStore.of(config)
    with console:
        engine = forward_engine_of(config, tokenizer, console.note)
        base = base_key(config, tokenizer, store)
        made = memory_rows(lambda: engine, tokenizer, store, base, prompts, benign, settings, console.note)
        rows = copied(made.rows, output)
        config = config.model_copy(update={"memory": config.memory.model_copy(update={"source": str(rows)})})
        shared_outputs(engine, prepare_memory(config, tokenizer), config, tokenizer, note=console.note)
    _show(console, made, rows)


def copied(rows: Path, output: Path | None) -> Path:
    """Return the file of the rows: in the store, or the copy that the user wants. Raises ConfigError where another file
    is in its place."""
    if output is None or environment.rank() != 0:
        return rows
    if output.exists() and output.read_bytes() != rows.read_bytes():
        raise ConfigError(f"--output: {output} exists already and holds something else; name another file")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(rows, output)
    except OSError as error:
        raise ConfigError(f"--output: {output}: {error.strerror}") from None
    return output


def _show(console: Console, made: MemoryRows, rows: Path) -> None:
    console.fact("rows", f"{made.kept.total():,}")
    for category, count in made.kept.most_common():
        console.note(f"  {category or 'no category'}: {count:,}")
    if made.left_out:
        console.fact("left out", ", ".join(f"{count:,} {reason}" for reason, count in made.left_out.items()))
    console.fact("use them", f"memory.source={rows}")
