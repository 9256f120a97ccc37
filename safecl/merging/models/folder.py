"""A model folder: its settings, and its weights in safetensors files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safecl.merging.models.tensor_files import TensorFiles
from safecl.storage.model_folder import (
    BIN_INDEX,
    BIN_WEIGHTS,
    INDEX,
    WEIGHTS,
    ModelFiles,
    is_gguf,
    read_model_files,
)
from safecl.storage.untrusted import UnusableWeights

MAX_SETTINGS_BYTES = 16 * 2**20
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py", "README.md"]


def local_folder(path: str) -> Path:
    """Return the folder of a model; a hub id is downloaded, or found in the hub's cache. Raises UnusableWeights."""
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if is_gguf(path):
        raise UnusableWeights(f"{path}: is a GGUF file; merges read Hugging Face folders, so convert it first")
    if local.exists():
        raise UnusableWeights(f"{path}: is a file; a merge reads the folder of a Hugging Face model")
    if local.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
        raise UnusableWeights(f"{path}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnusableWeights(f"{path}: no such folder, and not found on the hub: {first}") from None


def read_settings_file(path: Path) -> dict[str, Any]:
    """Read a JSON object of at most 16 MiB. Raises UnusableWeights."""
    try:
        if path.stat().st_size > MAX_SETTINGS_BYTES:
            raise UnusableWeights(f"{path}: {path.stat().st_size:,} bytes long, which no settings are")
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnusableWeights(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UnusableWeights(f"{path}: is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise UnusableWeights(f"{path}: holds no JSON object")
    return found


class FolderWeights(TensorFiles):
    """The weights of a model folder. Raises UnusableWeights where they cannot be used."""

    def __init__(self, path: str, label: str):
        self.folder = local_folder(path)
        self.settings = read_settings_file(self.folder / "config.json")
        _refuse_quantised(self.folder, self.settings)
        super().__init__(_open_files(self.folder), label)


def _refuse_quantised(folder: Path, settings: Mapping[str, Any]) -> None:
    if found := settings.get("quantization_config"):
        method = found.get("quant_method", "unknown") if isinstance(found, dict) else "unknown"
        raise UnusableWeights(
            f"{folder / 'config.json'}: the weights are quantised ({method}); merge the unquantised model, and "
            "quantise the result"
        )


def _open_files(folder: Path) -> ModelFiles:
    _check_index(folder)
    files = read_model_files(str(folder))
    if files is None or not files.tensors:
        pickled = next((name for name in (BIN_WEIGHTS, BIN_INDEX) if (folder / name).exists()), None)
        if pickled is not None:
            raise UnusableWeights(
                f"{folder / pickled}: weights in torch's pickle format are not read; save the model with "
                "save_pretrained, which writes safetensors"
            )
        raise UnusableWeights(f"{folder}: holds no weights: no {WEIGHTS} and no {INDEX}")
    _check_against_index(folder, files)
    return files


def _check_index(folder: Path) -> None:
    """Refuse an index that names files outside of the folder."""
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return
    places = read_settings_file(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UnusableWeights(f"{folder / INDEX}: has no weight_map from tensors to files")
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise UnusableWeights(f"{folder / INDEX}: places {name} in {file!r}, which is no file of the folder")


def _check_against_index(folder: Path, files: ModelFiles) -> None:
    if (folder / WEIGHTS).exists():
        return
    places = read_settings_file(folder / INDEX)["weight_map"]
    for name, file in places.items():
        if name not in files.tensors:
            raise UnusableWeights(f"{folder / INDEX}: places {name} in {file}, which does not hold it")
        if files.tensors[name][0].name != file:
            raise UnusableWeights(f"{files.tensors[name][0]}: holds {name}, which the index places in {file}")
    if extra := next((name for name in files.tensors if name not in places), None):
        raise UnusableWeights(f"{files.tensors[extra][0]}: holds {extra}, which {INDEX} does not name")
