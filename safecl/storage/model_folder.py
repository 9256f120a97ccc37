"""The files of a Hugging Face model: where each tensor lies, whether a file has changed, and the base of an adapter."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safecl.config.texts import visible
from safecl.storage.durable import DamagedCheckpoint
from safecl.storage.safetensors_file import Tensor, read_header
from safecl.storage.untrusted import UnusableWeights, check_folder, inside, read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN_WEIGHTS, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ADAPTER = "adapter_config.json"
MOST_ADAPTERS = 8

RUN_MODEL, FAILED_MODEL, LIVE_MODEL = "model", "model-failed", "model-live"
"""Folders of a run: the model that it hands back; in its place, one that did not pass the gate; the last weights where
the run hands back their average."""


def tuned_model(run: str | Path) -> Path | None:
    """Return the folder of a run's tuned model, `model` or `model-failed`; None where there is none yet."""
    folders = (Path(run) / name for name in (RUN_MODEL, FAILED_MODEL))
    return next((folder for folder in folders if folder.is_dir()), None)


def failed_instead(path: str | Path) -> Path | None:
    """Return the `model-failed` that stands in the place of a run's missing `model`; None where `path` is not such a
    folder."""
    path = Path(path)
    failed = path.with_name(FAILED_MODEL) if path.name == RUN_MODEL and not path.exists() else path
    return failed if failed != path and failed.is_dir() else None


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
    paths = [] if is_converted(path) else _paths(path, WEIGHTS, INDEX)
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


def bin_files(path: str) -> list[Path]:
    """Return the files of a model that is stored in torch's own format; none where it is not."""
    return _paths(path, BIN_WEIGHTS, BIN_INDEX)


def has_weights_here(path: str) -> bool:
    """Whether the model is a local folder, or its weights are in the hub's cache already."""
    if is_gguf(path) or Path(path).expanduser().is_dir():
        return True
    names = (WEIGHTS, INDEX, BIN_WEIGHTS, BIN_INDEX)
    return any(_locate(path, name, downloads=False) is not None for name in names)


def _paths(path: str, single_name: str, index_name: str) -> list[Path]:
    if (single := _locate(path, single_name)) is not None:
        return [single]
    index = _locate(path, index_name)
    if index is None:
        return []
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        files = {name: _locate(path, inside(index.parent, name).relative_to(index.parent).as_posix()) for name in names}
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, UnusableWeights):
            raise
        raise UnusableWeights(f"{index}: not an index of weight files") from None
    if missing := [name for name, file in files.items() if file is None]:
        raise UnusableWeights(f"{index}: names {visible(missing[0])}, which is not there")
    return [file for file in files.values() if file is not None]


def _locate(path: str, name: str, *, downloads: bool = True) -> Path | None:
    """Find a file in a local folder, or in the hub's cache."""
    local = Path(path).expanduser()
    if local.is_dir():
        return inside(local, name) if (local / name).exists() else None
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(path, name, _raise_exceptions_for_missing_entries=False, local_files_only=not downloads)
    except (OSError, ValueError) as error:
        raise UnusableWeights(f"model.path: {path}: {error}") from None
    return Path(found) if found is not None else None


def plan_files(sizes: Mapping[str, int], max_file_bytes: int) -> dict[str, list[str]]:
    """Assign tensors of these sizes in bytes to files named as transformers does: {file name: names of its tensors}. A
    file has at most `max_file_bytes`, or one larger tensor."""
    groups: list[list[str]] = [[]]
    pending = 0
    for name, size in sizes.items():
        if groups[-1] and pending + size > max_file_bytes:
            groups.append([])
            pending = 0
        groups[-1].append(name)
        pending += size
    count = len(groups)
    if count == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i + 1:05d}-of-{count:05d}.safetensors": names for i, names in enumerate(groups)}


# ---------------------------------------------------------------------------------------------------- adapters and GGUF


def is_gguf(path: str) -> bool:
    """Whether the path is a .gguf file."""
    return path.endswith(".gguf") and Path(path).expanduser().is_file()


def is_adapter(path: str) -> bool:
    """Whether the path is a folder that holds the adapter of a model and not the model."""
    folder = Path(path).expanduser()
    return (folder / ADAPTER).is_file() and not (folder / "config.json").is_file()


def is_converted(path: str) -> bool:
    """Whether the weights come from a .gguf file or an adapter and its base, not straight from files of tensors."""
    return is_gguf(path) or is_adapter(path)


def adapter_base(path: str) -> str:
    """Return the model that an adapter folder is for: a hub id, or a folder. A relative one is looked for from the
    adapter's own place, then from here.

    Raises UnusableWeights.
    """
    file = Path(path).expanduser() / ADAPTER
    check_folder(file.parent)
    try:
        named = read_json(file)["base_model_name_or_path"]
    except (KeyError, TypeError):
        raise UnusableWeights(f"{file}: has no base_model_name_or_path") from None
    if not isinstance(named, str) or not named:
        raise UnusableWeights(f"{file}: base_model_name_or_path names no model")
    base = Path(named).expanduser()
    places = [base] if base.is_absolute() else [file.parent / base, file.parent.resolve() / base, base]
    found = next((place for place in places if place.exists()), None)
    if found is not None:
        return os.fspath(found.resolve())
    if base.is_absolute() or named.startswith((".", "~")) or named.count("/") != 1:
        looked = ", ".join(dict.fromkeys(os.fspath(place.absolute()) for place in places))
        raise UnusableWeights(
            f"{file}: its base model {named} is not there (looked for at {looked}); "
            "put the base model there, or write its path into base_model_name_or_path"
        )
    return named


def settings_source(path: str) -> tuple[str, dict[str, Any]]:
    """Return where transformers finds a model's settings: a folder or hub id, and further arguments of
    `from_pretrained`. An adapter has those of its base.

    Raises UnusableWeights.
    """
    for _ in range(MOST_ADAPTERS):
        if not is_adapter(path):
            break
        path = adapter_base(path)
    else:
        raise UnusableWeights(f"model.path: {path}: an adapter of an adapter, more than {MOST_ADAPTERS} times")
    local = Path(path).expanduser()
    if is_gguf(path):
        return os.fspath(local.parent), {"gguf_file": local.name}
    if local.is_dir():
        check_folder(local)
        return os.fspath(local), {}
    return path, {}
