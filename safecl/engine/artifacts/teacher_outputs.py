"""The aligned model's outputs on memory rows as an artifact, the teacher cache: computed once, shared by all runs on
that model.

A cache belongs to one model, tokenizer and settings, and holds the rows of every memory that was ever used with them,
by their contents. A run adds the rows that are missing. Training with the cache needs no teacher in memory.

Each row has a forward pass of its own. So its outputs depend on nothing else: not on the rows that were missing when a
build was stopped and started again, and not on the run that came first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from safecl.config import ConfigError, RunConfig
from safecl.config.run import memory_tokens
from safecl.data import TokenDataset
from safecl.distributed import collectives
from safecl.engine.artifacts.base_model import base_key
from safecl.engine.artifacts.store import ArtifactStore, ask_first_rank, obtain
from safecl.engine.model.adapters import base_model
from safecl.engine.passes.forward_engine import ForwardEngine
from safecl.engine.passes.training_engine import TrainingEngine
from safecl.engine.teachers.outputs import mean_nll, outputs_of_rows, stored_form
from safecl.replay import CacheHeader, CacheReader, CacheWriter, ReplayError, SharedOutputs

KIND = "teacher-cache"
ROWS_AT_ONCE = 32
SECONDS_BETWEEN_NOTES = 15.0

Note = Callable[[str], None]


def needs_outputs(config: RunConfig) -> bool:
    """True where a run needs the aligned model's outputs on the memory's rows."""
    memory = config.memory
    if memory is None:
        return False
    guarded = memory.guard is not None and (memory.guard.max_nll is not None or memory.guard.max_deviations is not None)
    replayed = memory.teacher.kind == "topk" and config.needs_teacher
    return guarded or memory.draw == "mix_cd" or replayed


def header_of(config: RunConfig, base: dict[str, Any], vocab_size: int, max_tokens: int) -> CacheHeader:
    """Make the header of the config's cache; `base` is what `base_key` returned."""
    assert config.memory is not None
    teacher = config.memory.teacher
    return CacheHeader(
        model=base["model"],
        tokenizer=base["tokenizer"],
        vocab_size=vocab_size,
        k=min(teacher.k, vocab_size),
        temperature=teacher.temperature,
        indices=teacher.indices,
        model_dtype=base["dtype"],
        max_tokens=max_tokens,
    )


def shared_outputs(
    engine: TrainingEngine | ForwardEngine,
    dataset: TokenDataset,
    config: RunConfig,
    tokenizer: Any,
    *,
    note: Note = lambda message: None,
) -> SharedOutputs:
    """Return the base model's outputs on all rows of the memory; compute those that are missing.

    The engine's current weights must be the base model's. A collective call. Raises ConfigError where the store cannot
    be used, ReplayError where outputs cannot be written.
    """
    store = ArtifactStore.of(config)
    vocab_size = base_model(engine.module.model).config.get_text_config().vocab_size
    # Rows that nothing has cut have the same outputs under any limit.
    max_tokens = memory_tokens(config) if any(report.truncated for report in dataset.reports) else 0
    header = header_of(config, base_key(config, tokenizer, store), vocab_size, max_tokens)
    folder = obtain(
        store,
        KIND,
        vars(header),
        texts=dataset.paths,
        build=lambda folder: write_outputs(engine, dataset, header, folder, note),
        note=note,
        is_whole=lambda folder: holds(folder, header, dataset),
        hashed=False,
    )
    outputs = SharedOutputs(folder, header)
    outputs.reader.require(dataset.row_ids)
    return outputs


def relink(
    engine: TrainingEngine,
    dataset: TokenDataset,
    config: RunConfig,
    tokenizer: Any,
    memory: Path,
    *,
    note: Note = lambda message: None,
) -> None:
    """Before a run is resumed, compute outputs that its memory needs and the cache has lost, and name the cache in the
    memory's folder again. A collective call.

    The engine's weights are still the base model's then. Nothing is done where the memory has outputs of its own.
    """
    assert config.memory is not None
    shares = needs_outputs(config) and config.memory.teacher.kind == "topk" and config.tasks[0].role != "align"
    if not shares or not ask_first_rank(memory.is_dir):
        return
    outputs = shared_outputs(engine, dataset, config, tokenizer, note=note)
    ask_first_rank(lambda: outputs.link(memory))


def holds(folder: Path, header: CacheHeader, dataset: TokenDataset) -> bool:
    """True where the cache has outputs of every row. Raises ConfigError where it cannot be read."""
    try:
        return bool(CacheReader(folder, header).has(dataset.row_ids).all())
    except ReplayError as error:
        raise ConfigError(str(error)) from None


def write_outputs(
    engine: TrainingEngine | ForwardEngine,
    dataset: TokenDataset,
    header: CacheHeader,
    folder: Path,
    note: Note = lambda message: None,
) -> None:
    """Add the outputs of the engine's current model on rows that the cache does not hold. A collective call."""
    with CacheWriter(folder, header, rank=collectives.rank(), world_size=collectives.world_size()) as writer:
        missing = dataset.select(np.flatnonzero(~writer.has(dataset.row_ids)))
        collectives.barrier()  # every rank has looked before one writes
        noted_at, done = time.monotonic(), 0
        settings: dict[str, Any] = {"k": header.k, "temperature": header.temperature}
        for rows in _portions(outputs_of_rows(engine, missing, "topk", alone=True, **settings)):
            row_ids = [int(missing.row_ids[index]) for index, _ in rows]
            writer.add(row_ids, [stored_form(output) for _, output in rows], [mean_nll(output) for _, output in rows])
            done += len(rows)
            if time.monotonic() - noted_at > SECONDS_BETWEEN_NOTES:
                noted_at = time.monotonic()
                note(f"{KIND}: about {min(len(missing), done * collectives.world_size()):,} of {len(missing):,} rows")
    collectives.barrier()  # whoever looks next finds the rows of every rank


def _portions(rows: Iterator[tuple[int, dict]]) -> Iterator[list[tuple[int, dict]]]:
    while portion := list(islice(rows, ROWS_AT_ONCE)):
        yield portion
