"""`safecl memory rewrite CFG`: lets the aligned model put the answers of the tasks' rows in its own words. Runs on any
number of ranks."""

from __future__ import annotations

from pathlib import Path

from safecl.commands.memory.build import copied
from safecl.commands.memory.cache import ranks
from safecl.commands.preflight import refuse_missing_files
from safecl.config import ConfigError, RunConfig
from safecl.config.method_registry import methods_that
from safecl.distributed import environment


def rewrite_rows(config: RunConfig, output: Path | None, max_new_tokens: int, batch_size: int) -> None:
    """Write what is missing, and print what became of the answers, and where they are. Raises ConfigError.

    output: file for a copy of the answers.
    """
    environment.join_launcher()
    if config.tasks[0].role == "align":
        raise ConfigError(
            "safecl memory rewrite: model.path is aligned only by the first task (role: align); "
            "train that first, then name its model"
        )
    config = config.model_copy(update={"methods": {}})  # the model answers as it is
    refuse_missing_files(config)
    from safecl.data import load_tokenizer
    from safecl.data.config_rows import read_rows_by_task
    from safecl.data.templates.thinking import check_thinking
    from safecl.engine.artifacts.base_model import base_key
    from safecl.engine.artifacts.memory_rows import RowSettings
    from safecl.engine.artifacts.rewritten import demonstrations, rewritten_rows
    from safecl.engine.artifacts.store import ArtifactStore
    from safecl.engine.passes.forward_engine import forward_engine_of
    from safecl.training.output.console import Console

    console, store = Console(1, environment.rank()), ArtifactStore.of(config)
    tokenizer = load_tokenizer(config.model)
    check_thinking(tokenizer)
    shown = []
    for task, rows in read_rows_by_task(config):
        shown += demonstrations(rows, None if task is None or task.eval is None else task.eval.metric)
    if not shown:
        raise ConfigError("safecl memory rewrite: the tasks' rows have no answer that follows a question")
    settings = RowSettings(max_new_tokens=max_new_tokens, batch_size=batch_size)
    with console, ranks(Path(config.output)):
        engine = forward_engine_of(config, tokenizer, console.note)
        base = base_key(config, tokenizer, store)
        path, counts = rewritten_rows(engine, tokenizer, store, base, shown, settings, console.note)
        path = copied(path, output)
    console.fact("answers", f"{counts.total():,}")
    for what, count in counts.most_common():
        console.note(f"  {what}: {count:,}")
    reader = methods_that(lambda method: method.needs_answers)[0]
    console.fact("use them", f"methods.{reader}.answers={path}")
