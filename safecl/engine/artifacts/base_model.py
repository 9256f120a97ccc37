"""The parts of an artifact's key: hashes of the base model and of rows, and the versions of packages."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import xxhash

from safecl.config import RunConfig
from safecl.data import TokenDataset
from safecl.engine.artifacts.store import ArtifactStore, ask_first_rank
from safecl.storage.durable import hash_file
from safecl.storage.model_records import ModelRecords, model_files, stamps_of


def base_key(config: RunConfig, tokenizer: Any, store: ArtifactStore) -> dict[str, Any]:
    """Return the part of a key that every artifact of the config's base model has: hashes of model and tokenizer, and
    the dtype that it runs in.

    A collective call, the same on every rank. Raises ConfigError where the model's files cannot be read.
    """
    from safecl.data.prepare import tokenizer_key

    return {
        "model": ask_first_rank(lambda: model_hash(config.model.path, store)),
        "tokenizer": tokenizer_key(tokenizer),
        "dtype": config.model.dtype,
    }


def model_hash(path: str, store: ArtifactStore | None = None) -> str:
    """Hash the contents of a model's weights, its config.json and its own code (XXH3-128); `path` is a folder or a hub
    id.

    It does not matter where the files are. With a store, files that have not changed are not read again.
    """
    files = model_files(path)
    stamps, records = stamps_of(files), None if store is None else ModelRecords(store.folder)
    if records is not None and isinstance(known := records.find(path, stamps), str):
        return known
    with ThreadPoolExecutor(4) as threads:
        contents = list(threads.map(lambda file: hash_file(file.resolve()), files))
    text = json.dumps([[file.name, content] for file, content in zip(files, contents, strict=True)])
    digest = xxhash.xxh3_128_hexdigest(text.encode())
    if records is not None:
        records.keep(path, stamps, digest)
    return digest


def once_per_model(path: str, what: str, store: ArtifactStore, work: Callable[[], None]) -> None:
    """Do `work`, which passes or raises, unless it has passed before with the model's files as they are now. what: its
    name in the store."""
    stamps, name, records = stamps_of(model_files(path)), f"{what} {path}", ModelRecords(store.folder)
    if records.find(name, stamps) != what:
        work()
        records.keep(name, stamps, what)


def fingerprint(dataset: TokenDataset) -> str:
    """Hash the rows: their ids (hashes of their contents), lengths and numbers of targets, in order. It does not matter
    where the file is."""
    digest = xxhash.xxh3_128()
    for column in (dataset.row_ids, dataset.lengths, dataset.num_targets):
        digest.update(np.ascontiguousarray(column).data)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of the packages that decide the last bits of a result. DeepSpeed's is that of its metadata: an import
    takes half a second."""
    import transformers

    import safecl

    own = {package.__name__: str(package.__version__) for package in (safecl, torch, transformers)}
    return own | {"deepspeed": version("deepspeed")}
