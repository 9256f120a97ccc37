"""The safetensors files of a Hugging Face model: which tensor lies where, and whether they are still what they were."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safecl.config import ConfigError
from safecl.storage.durable import DamagedCheckpoint
from safecl.storage.safetensors_file import Tensor, read_header

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class UnusableWeights(ConfigError):
    """A model's weights cannot be used; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Stamp:
    """What tells that a file was changed or replaced."""

    device: int
    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        found = os.stat(path)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class ModelFiles:
    """Tensors of a model folder by the names that they have there, and the files as they were when their headers were
    read."""

    tensors: Mapping[str, tuple[Path, Tensor]]
    stamps: Mapping[Path, Stamp]

    def check_unchanged(self) -> None:
        """UnusableWeights naming the first file that is another one than when the run began."""
        for path, stamp in self.stamps.items():
            try:
                now = Stamp.of(path)
            except OSError as error:
                raise UnusableWeights(
                    f"{path}: {error.strerror}, but the run that began with this file still needs it"
                ) from None
            if now != stamp:
                raise UnusableWeights(f"{path}: was changed since the run began; put the file back, or start a new run")


def read_model_files(path: str) -> ModelFiles | None:
    """Headers of all files of a local folder or a hub id (fetched where it is not there yet); None where it has no
    safetensors weights.

    Raises UnusableWeights for files that are missing, truncated or no safetensors.
    """
    paths = _paths(path)
    if not paths:
        return None
    tensors: dict[str, tuple[Path, Tensor]] = {}
    stamps = {}
    for file in paths:
        try:
            stamps[file] = Stamp.of(file)
            header, _ = read_header(file.resolve())
        except OSError as error:
            raise UnusableWeights(f"{file}: {error.strerror}") from None
        except DamagedCheckpoint as error:
            raise UnusableWeights(f"{error}: the file is damaged or was not copied in full") from None
        tensors |= {name: (file, tensor) for name, tensor in header.items()}
    return ModelFiles(tensors, stamps)


def _paths(path: str) -> list[Path]:
    if (single := _locate(path, SINGLE)) is not None:
        return [single]
    index = _locate(path, INDEX)
    if index is None:
        return []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UnusableWeights(f"{index}: not an index of safetensors files") from None
    found = {name: _locate(path, str(name)) for name in names}
    if missing := [name for name, where in found.items() if where is None]:
        raise UnusableWeights(f"{index}: names {missing[0]}, which is not there")
    return list(found.values())


def _locate(path: str, name: str) -> Path | None:
    """The file in a local folder, or in the cache of the hub."""
    if Path(path).is_dir():
        found = Path(path) / name
        return found if found.exists() else None
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise UnusableWeights(f"model.path: {path}: {error}") from None
    return Path(found) if found is not None else None
