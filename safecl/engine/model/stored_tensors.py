"""The tensors of a model's files, in safetensors or in torch's own format: their shapes, and single values."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from safecl.engine.model.tensor_names import Shapes
from safecl.storage.durable import DamagedCheckpoint
from safecl.storage.model_folder import ADAPTER, BIN_WEIGHTS, WEIGHTS, bin_files, read_model_files
from safecl.storage.safetensors_file import read_header
from safecl.storage.untrusted import UnusableWeights, library_error


def stored_shapes(path: str) -> Shapes:
    """Return the shapes of a model's tensors by their names in its files. Raises UnusableWeights where it has none."""
    files = read_model_files(path)
    if files is not None:
        return {name: tensor.shape for name, (_, tensor) in files.tensors.items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in bin_files(path):
        tensors = {name: value for name, value in _load(file, "meta").items() if isinstance(value, torch.Tensor)}
        shapes |= {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if not shapes:
        raise UnusableWeights(f"model.path: {path} holds no weights: no {WEIGHTS}, no {BIN_WEIGHTS} and no index")
    return shapes


def stored_tensor(path: str, name: str) -> torch.Tensor:
    """Read one tensor of a model's files."""
    files = read_model_files(path)
    if files is not None:
        from safetensors import safe_open

        with safe_open(files.tensors[name][0], framework="pt") as opened:
            return opened.get_tensor(name)
    return next(state[name] for file in bin_files(path) if name in (state := _load(file, "cpu")))


def check_adapter(path: str) -> None:
    """Raise UnusableWeights where peft could not read an adapter folder."""
    import peft

    folder = Path(path).expanduser()
    try:
        peft.PeftConfig.from_pretrained(os.fspath(folder))
    except Exception as error:  # it makes a class of whatever the file names
        raise UnusableWeights(f"{folder / ADAPTER}: no adapter that peft knows: {library_error(error)}") from None
    if (weights := folder / "adapter_model.safetensors").is_file():
        try:
            read_header(weights)
        except DamagedCheckpoint as error:
            raise UnusableWeights(f"{error}: the adapter is damaged") from None
    elif (weights := folder / "adapter_model.bin").is_file():
        _load(weights, "meta")
    else:
        raise UnusableWeights(f"{folder}: holds no weights of an adapter (adapter_model.safetensors)")


def _load(file: Path, place: str) -> dict[str, Any]:
    """Load a file of torch's own format; the values stay on the disk until they are read."""
    from transformers.modeling_utils import load_state_dict

    try:
        return load_state_dict(os.fspath(file), map_location=place)
    except Exception as error:  # pickle and zip raise many kinds
        raise UnusableWeights(f"{file}: cannot be read: {library_error(error)}") from None
