"""The one reader of the rows that a run config names: tasks, memory, poison, held-out rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from safecl.config import EvalConfig, FieldMap, RunConfig, TaskConfig
from safecl.config.data import RowsSource
from safecl.config.memory import MemoryConfig
from safecl.config.run import harmful_sources, memory_tokens
from safecl.data import (
    ChatRow,
    DataError,
    Prompt,
    TokenDataset,
    concat,
    mix_poison,
    prepare_dataset,
    read_prompts,
    read_rows,
)
from safecl.data.order import keyed_hash
from safecl.data.rewriting import Rewriting
from safecl.storage.cache_folder import prepared_folder
from safecl.storage.durable import hash_file

# ----------------------------------------------------------------------------------------------------------- tokenised


def prepare_task(config: RunConfig, task: TaskConfig, tokenizer: Any) -> tuple[TokenDataset, int]:
    """The task's tokenised rows with the poison and rows of earlier tasks mixed in, and the number of poisoned rows.
    Raises DataError."""
    dataset, num_poisoned = _rows_of_task(config, task, tokenizer)
    if task.mix == 0:
        return dataset, num_poisoned
    mixed = [dataset]
    for earlier in config.tasks[: config.tasks.index(task)]:
        if earlier.role == "task":
            rows = _rows_of_task(config, earlier, tokenizer)[0]
            order = np.argsort(keyed_hash(rows.row_ids, "mix", config.train.seed, task.name), kind="stable")
            mixed.append(rows.select(np.sort(order[: round(task.mix * len(rows))])))
    return concat(mixed), num_poisoned


def _rows_of_task(config: RunConfig, task: TaskConfig, tokenizer: Any) -> tuple[TokenDataset, int]:
    """A task's own rows, or the part of them that it trains, with the poison, and the number of rows of the poison."""
    poison, max_length = config.poison, config.train.max_length
    rewriting = None if task.role == "align" else rewriting_of(config)
    dataset = _prepare(config, task.rows_source, tokenizer, max_length, rewriting)
    number, total = task.part or (1, 1)
    if total > 1:
        dataset = dataset.select(np.flatnonzero(part_of(dataset.row_ids, total, config.train.seed) == number))
        if len(dataset) == 0:
            raise DataError(
                f"task {task.name}: no row of {task.train} is in part {number} of {total}; make fewer parts"
            )
    if poison.ratio == 0 or task.role == "align":
        return dataset, 0
    poisoned = _prepare(config, poison.rows_source, tokenizer, max_length, rewriting)
    mixed = mix_poison(dataset, poisoned, poison.ratio, poison.seed + number - 1)
    return mixed, len(mixed) - len(dataset)


def part_of(row_ids: np.ndarray, total: int, seed: int) -> np.ndarray:
    """Return the part that each row belongs to, counted from 1: int64 [N]. Parts are disjoint and differ in size by one
    row at most."""
    place = np.empty(len(row_ids), np.int64)
    place[np.argsort(keyed_hash(row_ids, "part", seed), kind="stable")] = np.arange(len(row_ids))
    return place % total + 1


def rewriting_of(config: RunConfig) -> Rewriting | None:
    """Return the change that a method of the config makes to the task's rows; None where no method rewrites any."""
    for name, settings in config.methods.items():
        if settings.rewrites:
            contents = "" if settings.answers_file is None else f" {hash_file(Path(settings.answers_file))}"
            return Rewriting(f"{name} {settings.model_dump_json()}{contents}", settings.rewrite)
    return None


def prepare_memory(config: RunConfig, tokenizer: Any) -> TokenDataset:
    """The tokenised rows of the memory. Raises DataError."""
    assert config.memory is not None, "only a config with a memory has memory rows"
    return _prepare(config, config.memory.rows_source, tokenizer, memory_tokens(config))


def prepare_harmful(config: RunConfig, tokenizer: Any) -> dict[str, TokenDataset]:
    """The tokenised harmful rows that methods take gradients on, by file. Raises DataError."""
    paths = dict.fromkeys(harmful_sources(config).values())
    return {path: _prepare(config, RowsSource(path), tokenizer, config.train.max_length) for path in paths}


def _prepare(
    config: RunConfig, source: RowsSource, tokenizer: Any, max_length: int, rewriting: Rewriting | None = None
) -> TokenDataset:
    return prepare_dataset(
        source.path,
        split=source.split,
        format=source.format,
        fields=source.fields,
        max_rows=source.max_rows,
        max_bad_rows=config.train.max_bad_rows,
        tokenizer=tokenizer,
        max_length=max_length,
        cache_dir=prepared_folder(config),
        rewriting=rewriting,
    )


# ---------------------------------------------------------------------------------------------------------------- text


def read_training_rows(config: RunConfig) -> list[ChatRow]:
    """All rows that the run takes gradients on: tasks, memory, poison, harmful rows. Raises DataError.

    Rows of the memory that the model has yet to write are their prompts.
    """
    tasks, memory = _read(config, [task.rows_source for task in config.tasks]), read_memory_rows(config)
    harmful = [RowsSource(path) for path in dict.fromkeys(harmful_sources(config).values())]
    return [*tasks, *memory, *_read(config, [*_poison(config), *harmful])]


def read_rows_by_task(config: RunConfig) -> list[tuple[TaskConfig | None, list[ChatRow]]]:
    """The rows of each task but the alignment stage; last those of the poison, with no task. Raises DataError."""
    found: list[tuple[TaskConfig | None, list[ChatRow]]] = [
        (task, _read(config, [task.rows_source])) for task in config.tasks if task.role == "task"
    ]
    return found + [(None, _read(config, [source])) for source in _poison(config)]


def read_upload_rows(config: RunConfig) -> list[ChatRow]:
    """Rows of all tasks but the alignment stage, and of the poison that is mixed into them. Raises DataError."""
    uploads = [task.rows_source for task in config.tasks if task.role == "task"]
    return _read(config, [*uploads, *_poison(config)])


def read_memory_rows(config: RunConfig) -> list[ChatRow]:
    """Rows of the memory; none without one. Raises DataError.

    Rows that the model has yet to write are their prompts.
    """
    if config.memory is None:
        return []
    if config.memory.awaits_rows:
        disallowed, benign = memory_prompts(config.memory)
        return [ChatRow(prompt.messages, prompt.path, prompt.line, prompt.tags) for prompt in [*disallowed, *benign]]
    return _read(config, [config.memory.rows_source])


def memory_prompts(memory: MemoryConfig) -> tuple[list[Prompt], list[Prompt]]:
    """The disallowed and the benign prompts that the aligned model answers for the memory. Raises DataError."""
    assert memory.prompts is not None, "a memory of rows names no prompts"
    most = memory.answers.max_prompts
    benign = [] if memory.benign_prompts is None else read_prompts(memory.benign_prompts, most, only_safe=True)
    return read_prompts(memory.prompts, most), benign


def read_eval_rows(config: EvalConfig | None, fields: FieldMap | None) -> list[ChatRow]:
    """Held-out rows of a task, read with the task's own `fields` where the section `eval` has none; none without that
    section. Raises DataError."""
    if config is None:
        return []
    source = config.rows_source(fields)
    return read_rows(source.path, format=source.format, fields=source.fields, max_rows=source.max_rows)[0]


def _poison(config: RunConfig) -> list[RowsSource]:
    return [config.poison.rows_source] if config.poison.ratio > 0 else []


def _read(config: RunConfig, sources: list[RowsSource]) -> list[ChatRow]:
    rows: list[ChatRow] = []
    for source in sources:
        rows += read_rows(
            source.path,
            split=source.split,
            format=source.format,
            fields=source.fields,
            max_rows=source.max_rows,
            max_bad_rows=config.train.max_bad_rows,
        )[0]
    return rows
