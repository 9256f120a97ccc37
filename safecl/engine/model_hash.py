"""Which model is this? A hash of the weights by name, the same however they are divided into files. Imports no torch."""

from __future__ import annotations

from pathlib import Path

import xxhash

from safecl.config import ConfigError
from safecl.engine.durable import BLOCK_BYTES, DamagedCheckpoint, open_regular, read_into
from safecl.engine.tensor_file import Tensor, read_header


def model_hash(path: str) -> str:
    """XXH3-128 of all tensors (name, dtype, shape, bytes) in a model folder or hub id. Reads every byte once. Raises ConfigError."""
    try:
        return _hash_tensors(_tensors(weight_files(path)))
    except DamagedCheckpoint as error:
        raise ConfigError(f"model.path: {error}") from None


def weight_files(path: str) -> list[Path]:
    """The .safetensors files of a model folder or hub id (downloaded where needed). ConfigError where there are none."""
    folder = Path(path) if Path(path).is_dir() else _download(path)
    files = sorted(file.resolve() for file in folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"model.path: {folder} holds no .safetensors weights")
    return files


def _download(path: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:
        raise ConfigError(f"model.path: {path}: no folder, and not on the hub: {str(error).strip().splitlines()[0][:200]}") from None


def _tensors(files: list[Path]) -> dict[str, tuple[Path, Tensor]]:
    return {name: (file, tensor) for file in files for name, tensor in read_header(file)[0].items()}


def _hash_tensors(tensors: dict[str, tuple[Path, Tensor]]) -> str:
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(BLOCK_BYTES))
    for name in sorted(tensors):
        path, tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{tensor.shape}".encode())
        with open_regular(path) as file:
            for start in range(0, tensor.nbytes, BLOCK_BYTES):
                part = block[: min(BLOCK_BYTES, tensor.nbytes - start)]
                read_into(file, tensor.position + start, part)
                digest.update(part)
    return digest.hexdigest()
