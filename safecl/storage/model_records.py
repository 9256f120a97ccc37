"""Records of facts about a model that hold as long as its files stay the same: hashes, checks that passed, its outline,
the class of its tokenizer. Nothing here is about rows. Imports no torch.

    models.json         in the store of artifacts: {name: [basis, value]}

A record is used only where its basis is the same: the stamps of the files that decide the value and, where packages
decide it too, their versions. A file that cannot be read, or that holds anything else, is as good as none.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import safecl
from safecl.config import ConfigError, RunConfig
from safecl.storage.cache_entries import MODELS
from safecl.storage.cache_folder import artifact_folder
from safecl.storage.durable import replace_file
from safecl.storage.locks import waiting_lock
from safecl.storage.model_folder import adapter_base, is_adapter, is_converted, is_gguf, read_model_files
from safecl.storage.untrusted import text_files

_LOCK = "models.lock"
MOST_RECORDS = 200
"""The oldest records beyond these are dropped; a model has five or so."""
_PACKAGES = ("torch", "transformers", "peft")

Basis: TypeAlias = list[Any]
"""What a value depends on, as JSON: stamps of files, versions of packages."""


@dataclass(frozen=True)
class ModelRecords:
    """The records in a store of artifacts. folder: the store's."""

    folder: Path

    @classmethod
    def of(cls, config: RunConfig) -> ModelRecords:
        """Return the records in the store that the config names, or in the default one."""
        return cls(artifact_folder(config))

    def find(self, name: str, basis: Basis) -> Any:
        """Return the value of a record, as JSON gives it; None where there is none on this basis."""
        record = self._all().get(name)
        if not isinstance(record, list) or len(record) != 2 or record[0] != basis:
            return None
        return record[1]

    def keep(self, name: str, basis: Basis, value: Any) -> None:
        """Add or replace a record. A store that cannot be written stays as it is."""
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with waiting_lock(self.folder / _LOCK):
                known = self._all()
                known.pop(name, None)
                kept = dict(list(known.items())[-MOST_RECORDS + 1 :]) | {name: [basis, value]}
                replace_file(self.folder / MODELS, json.dumps(kept, separators=(",", ":")))

    def _all(self) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / MODELS).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}


# ---------------------------------------------------------------------------------------------------------------- basis


def stamps_of(files: Sequence[Path]) -> Basis:
    """Return the place of each file and the attributes that change when it is edited or replaced. Raises OSError."""
    stamps: Basis = []
    for file in files:
        found = file.stat()
        stamps.append([str(file.resolve()), found.st_ino, found.st_size, found.st_mtime_ns])
    return stamps


@functools.cache
def package_versions() -> Basis:
    """Return the versions of the packages that decide what a model's settings and code mean."""
    return [safecl.__version__, *map(_version, _PACKAGES)]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def model_basis(path: str) -> Basis | None:
    """Return the basis of what a model's weights, its settings and the packages decide. path: a folder, or a hub id
    whose files are here. None where more decides it, as for an adapter, or where the files cannot be read."""
    return _basis(path, model_files)


def tokenizer_basis(path: str) -> Basis | None:
    """Return the basis of what all files but the weights decide; see `model_basis`."""
    return _basis(path, lambda path: text_files(_folder_of(path)))


def _basis(path: str, files_of: Callable[[str], list[Path]]) -> Basis | None:
    if is_converted(path):
        return None
    try:
        return [stamps_of(files_of(path)), package_versions()]
    except (ConfigError, OSError):  # whoever reads the files says what is wrong with them
        return None


def model_files(path: str) -> list[Path]:
    """Return the files that decide what a model computes: weights, config.json and its own code.

    path: a folder or a hub id. Raises ConfigError.
    """
    if is_gguf(path):
        return [Path(path).expanduser()]
    if is_adapter(path):
        own = Path(path).expanduser()
        return [*model_files(adapter_base(path)), *sorted(own.glob("adapter_*"))]
    found, folder = read_model_files(path), _folder_of(path)
    weights = list(found.stamps) if found is not None else [*folder.glob("*.bin"), *folder.glob("*.safetensors")]
    return sorted([*weights, *folder.glob("config.json"), *folder.glob("*.py")], key=lambda file: file.name)


def _folder_of(path: str) -> Path:
    """The model's folder; that of a hub id is in the hub's cache."""
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    from transformers.utils.hub import cached_file

    try:
        settings = cached_file(path, "config.json")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"model.path: {path}: {str(error).splitlines()[0]}") from None
    assert settings is not None, "cached_file raises where there is no such file"
    return Path(settings).parent
