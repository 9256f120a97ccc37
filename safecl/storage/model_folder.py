"""The safetensors files of a Hugging Face model: where each tensor lies, and whether a file has changed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safecl.config import ConfigError
from safecl.storage.durable import DamagedCheckpoint
from safecl.storage.safetensors_file import Tensor, read_header

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class UnusableWeights(ConfigError):
    """A model's weights cannot be used; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Stamp:
    """Attributes of a file that change when it is edited or replaced."""

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
    """Tensors of a model folder by their names there, and the stamps of its files when their headers were read."""

    tensors: Mapping[str, tuple[Path, Tensor]]
    stamps: Mapping[Path, Stamp]

    def check_unchanged(self) -> None:
        """Raise UnusableWeights with the name of the first file that has changed since the run began."""
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
    """Read the headers of a model's safetensors files; None where the model has none.

    `path` is a local folder or a hub id, whose files are downloaded where they are missing. Raises UnusableWeights for
    files that are missing, truncated or not safetensors.
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
    if (single := _locate(path, WEIGHTS)) is not None:
        return [single]
    index = _locate(path, INDEX)
    if index is None:
        return []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UnusableWeights(f"{index}: not an index of safetensors files") from None
    found = []
    for name in names:
        if (file := _locate(path, str(name))) is None:
            raise UnusableWeights(f"{index}: names {name}, which is not there")
        found.append(file)
    return found


def _locate(path: str, name: str) -> Path | None:
    """Find a file in a local folder, or in the hub's cache."""
    if Path(path).is_dir():
        local = Path(path) / name
        return local if local.exists() else None
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise UnusableWeights(f"model.path: {path}: {error}") from None
    return Path(found) if found is not None else None
