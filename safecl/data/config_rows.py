"""Reads the rows that a run config names: tasks, memory, poison, held-out rows."""

from __future__ import annotations

from typing import Any

from safecl.config import (
    EvalConfig,
    FieldMap,
    RunConfig,
    TaskConfig,
)
from safecl.config.run import memory_tokens
from safecl.data import (
    ChatRow,
    TokenDataset,
    mix_poison,
    prepare_dataset,
    read_rows,
)
from safecl.storage.cache_folder import data_cache


def prepare_section(config: RunConfig, path: str, section, tokenizer, max_length: int) -> TokenDataset:
    return prepare_dataset(
        path,
        split=getattr(section, "split", "train"),
        format=section.format,
        fields=section.fields,
        max_rows=getattr(section, "max_rows", None),
        max_bad_rows=config.train.max_bad_rows,
        tokenizer=tokenizer,
        max_length=max_length,
        cache_dir=data_cache(),
    )


def prepare_memory(config: RunConfig, tokenizer) -> TokenDataset:
    """The rows of memory.source. Raises ConfigError (DataError for rows)."""
    return prepare_section(config, config.memory.source, config.memory, tokenizer, max_length=memory_tokens(config))


def prepare_task(config: RunConfig, task: TaskConfig, tokenizer) -> tuple[TokenDataset, int]:
    """The task's rows, poison mixed in where the config says so, and how many of them are poisoned."""
    poison, max_length = config.poison, config.train.max_length
    dataset = prepare_section(config, task.train, task, tokenizer, max_length)
    if poison.ratio == 0 or task.role == "align":
        return dataset, 0
    mixed = mix_poison(
        dataset, prepare_section(config, poison.source, poison, tokenizer, max_length), poison.ratio, poison.seed
    )
    return mixed, len(mixed) - len(dataset)


def held_out_rows(task: TaskConfig, eval_config: EvalConfig | None) -> list[ChatRow]:
    if eval_config is None:
        return []
    fields = eval_config.fields or task.fields
    form = "fields" if fields is not None and eval_config.format == "auto" else eval_config.format
    rows, _ = read_rows(eval_config.path, format=form, fields=fields, max_rows=eval_config.max_rows)
    return rows


def training_rows(config: RunConfig) -> list[ChatRow]:
    """All rows that the model will see, for the check that no evaluation prompt is among them."""
    rows: list[ChatRow] = []
    sources = [(task.train, task) for task in config.tasks]
    if config.memory is not None:
        sources.append((config.memory.source, config.memory))
    if config.poison.ratio > 0:
        sources.append((config.poison.source, config.poison))
    for path, section in sources:
        found, _ = read_rows(
            path,
            split=getattr(section, "split", "train"),
            format=section.format,
            fields=section.fields,
            max_rows=getattr(section, "max_rows", None),
            max_bad_rows=config.train.max_bad_rows,
        )
        rows += found
    return rows


def read_eval_rows(config: EvalConfig, fields: FieldMap | None) -> list[Any]:
    """Held-out rows of a task, read with the task's own `fields` where the eval section has none."""
    from safecl.data import read_rows

    fields = config.fields or fields
    format = "fields" if fields is not None and config.format == "auto" else config.format
    return read_rows(config.path, format=format, fields=fields, max_rows=config.max_rows)[0]


def rows_of_run(config: RunConfig) -> list[Any]:
    """All rows that the run trains on: tasks, memory, poison."""
    from safecl.data import read_rows

    sources = [(task.train, task) for task in config.tasks]
    if config.memory is not None:
        sources.append((config.memory.source, config.memory))
    if config.poison.ratio > 0:
        sources.append((config.poison.source, config.poison))
    rows: list[Any] = []
    for path, section in sources:
        options = {name: getattr(section, name) for name in ("split", "max_rows") if hasattr(section, name)}
        rows += read_rows(
            path, format=section.format, fields=section.fields, max_bad_rows=config.train.max_bad_rows, **options
        )[0]
    return rows


def upload_rows(config: RunConfig) -> list[ChatRow]:
    """Rows of all tasks but the alignment stage, and of the poison that is mixed into them."""
    sources = [(task.train, task) for task in config.tasks if task.role == "task"]
    if config.poison.ratio > 0:
        sources.append((config.poison.source, config.poison))
    return [row for path, section in sources for row in read_section(config, path, section)]


def read_section(config: RunConfig, path: str, section) -> list[ChatRow]:
    rows, _ = read_rows(
        path, split=getattr(section, "split", "train"), format=section.format, fields=section.fields,
        max_rows=getattr(section, "max_rows", None), max_bad_rows=config.train.max_bad_rows,
    )  # fmt: skip
    return rows
