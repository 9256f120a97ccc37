"""The Fisher information of a base model on the memory's rows as an artifact: the first run estimates it, all others
load it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safecl.config import RunConfig
from safecl.data import TokenDataset
from safecl.distributed import collectives
from safecl.engine.artifacts.base_model import base_key, fingerprint, versions
from safecl.engine.artifacts.store import ArtifactStore, obtain
from safecl.engine.fisher.estimate import estimate_fisher
from safecl.engine.fisher.file import FisherHeader, write_fisher
from safecl.engine.passes.step_rows import StepRow
from safecl.engine.passes.training_engine import TrainingEngine
from safecl.storage.sizes import free_bytes

KIND, FILE = "fisher", "fisher.safetensors"
SIGNS, EXACT = "random signs", "exact"
_OF_THE_MEMORY = ("capacity", "policy", "balance_by", "prefix_tokens", "guard")  # settings that decide its rows

Rows = tuple[Sequence[StepRow], Sequence[int]]
"""The memory's rows and their keys."""


def header_of(
    config: RunConfig,
    tokenizer: Any,
    dataset: TokenDataset,
    *,
    sign_batches: int,
    rows_per_batch: int,
    exact: bool = False,
) -> FisherHeader:
    """Make the header of a Fisher file of the config's base model; its mean is not known yet. A collective call."""
    base = base_key(config, tokenizer, ArtifactStore.of(config))
    if exact:
        sign_batches, rows_per_batch = 0, 1
    assert config.memory is not None
    memory = {name: value for name, value in config.memory.model_dump(mode="json").items() if name in _OF_THE_MEMORY}
    return FisherHeader(
        mean=0.0,
        num_weights=0,
        estimator=EXACT if exact else SIGNS,
        sign_batches=sign_batches,
        rows_per_batch=rows_per_batch,
        seed=config.train.seed,
        num_rows=len(dataset),
        rows=fingerprint(dataset),
        memory=json.dumps(memory, sort_keys=True),
        model=config.model.path,
        model_hash=base["model"],
        tokenizer=base["tokenizer"],
        dtype=base["dtype"],
        versions=versions(),
        mode="evaluation",
    )


def estimate_into(
    path: Path,
    header: FisherHeader,
    engine: TrainingEngine,
    rows: Rows,
    kind: str,
    note: Callable[[str], None] = lambda message: None,
) -> FisherHeader:
    """Estimate into the state `kind` with the header's settings, and write the file. A collective call. Raises
    ConfigError where the file cannot be written."""
    steps, ids = rows
    batches, size = (len(steps), 1) if header.estimator == EXACT else (header.sign_batches, header.rows_per_batch)
    mean = estimate_fisher(
        engine, steps, ids, seed=header.seed, sign_batches=batches, rows_per_batch=size, kind=kind, note=note
    )
    header = dataclasses.replace(header, mean=mean, num_weights=engine.shards.numel)
    write_fisher(path, header, engine.shards, engine.optimizer.tensors(kind))
    return header


def shared_fisher(
    config: RunConfig, header: FisherHeader, build: Callable[[Path], None], note: Callable[[str], None]
) -> Path:
    """Return the file in the store; `build(path)` writes it where it is missing. A collective call."""
    store = ArtifactStore.of(config)
    folder = obtain(store, KIND, header.key(), texts=(), build=lambda folder: build(folder / FILE), note=note)
    return folder / FILE


def has_room(config: RunConfig, num_weights: int) -> bool:
    """True on every rank where the store's disk has room for two such files (2 bytes a weight). A collective call."""
    return not collectives.any_rank(free_bytes(ArtifactStore.of(config).folder) < 4 * num_weights)
