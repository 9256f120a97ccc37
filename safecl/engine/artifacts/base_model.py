"""The parts of an artifact's key: hashes of the base model and of rows, and the versions of packages."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from safecl.config import ConfigError, RunConfig
from safecl.data import TokenDataset
from safecl.engine.artifacts.store import ArtifactStore, ask_first_rank
from safecl.storage.durable import hash_file, replace_file

MODELS = "models.json"


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
    stamps = [[str(file.resolve()), *_stamp(file)] for file in files]
    known = _known_hashes(store) if store is not None else {}
    if (entry := known.get(path)) is not None and entry[0] == stamps:
        return entry[1]
    with ThreadPoolExecutor(4) as threads:
        contents = list(threads.map(lambda file: hash_file(file.resolve()), files))
    text = json.dumps([[file.name, content] for file, content in zip(files, contents, strict=True)])
    digest = xxhash.xxh3_128_hexdigest(text.encode())
    if store is not None:
        _keep_hash(store, path, [stamps, digest])
    return digest


def once_per_model(path: str, what: str, store: ArtifactStore, work: Callable[[], None]) -> None:
    """Do `work`, which passes or raises, unless it has passed before with the model's files as they are now. what: its
    name in the store."""
    stamps, name = [[str(file.resolve()), *_stamp(file)] for file in model_files(path)], f"{what} {path}"
    if _known_hashes(store).get(name) != [stamps, what]:
        work()
        _keep_hash(store, name, [stamps, what])


def model_files(path: str) -> list[Path]:
    """Return the files that decide what a model computes: weights, config.json and its own code.

    path: a folder or a hub id. Raises ConfigError.
    """
    from safecl.storage.model_folder import adapter_base, is_adapter, is_gguf, read_model_files

    if is_gguf(path):
        return [Path(path).expanduser()]
    if is_adapter(path):
        own = Path(path).expanduser()
        return [*model_files(adapter_base(path)), *sorted(own.glob("adapter_*"))]
    found = read_model_files(path)
    folder = Path(path) if Path(path).is_dir() else _hub_folder(path)
    weights = list(found.stamps) if found is not None else [*folder.glob("*.bin"), *folder.glob("*.safetensors")]
    return sorted([*weights, *folder.glob("config.json"), *folder.glob("*.py")], key=lambda file: file.name)


def _hub_folder(path: str) -> Path:
    from transformers.utils.hub import cached_file

    try:
        settings = cached_file(path, "config.json")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"model.path: {path}: {str(error).splitlines()[0]}") from None
    assert settings is not None, "cached_file raises where there is no such file"
    return Path(settings).parent


def _stamp(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_ino, found.st_size, found.st_mtime_ns]


def _known_hashes(store: ArtifactStore) -> dict[str, list[Any]]:
    try:
        found = json.loads((store.folder / MODELS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _keep_hash(store: ArtifactStore, path: str, entry: list[Any]) -> None:
    """Add an entry. Where two processes do so at once, one entry is lost, and its model is hashed again later."""
    with contextlib.suppress(OSError):  # a build reports a store that cannot be written
        store.folder.mkdir(parents=True, exist_ok=True)
        replace_file(store.folder / MODELS, json.dumps(_known_hashes(store) | {path: entry}))


def fingerprint(dataset: TokenDataset) -> str:
    """Hash the rows: their ids (hashes of their contents), lengths and numbers of targets, in order. It does not matter
    where the file is."""
    digest = xxhash.xxh3_128()
    for column in (dataset.row_ids, dataset.lengths, dataset.num_targets):
        digest.update(np.ascontiguousarray(column).data)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of the packages that decide the last bits of a result."""
    import deepspeed
    import transformers

    import safecl

    return {package.__name__: str(package.__version__) for package in (safecl, torch, deepspeed, transformers)}
