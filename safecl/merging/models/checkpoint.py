"""A checkpoint that a run has kept, as a model: the weights of its step, or their average, read from slices.

Settings, tokenizer and dtype are those of the run's base model, which its config.yaml names. The weights are fp32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
import xxhash

from safecl.config import ConfigError, parse_yaml
from safecl.engine.checkpoint.format import MANIFEST, WEIGHTS, Contents, check_hashes, ranges, read_contents
from safecl.engine.model.dtypes import FLOAT_DTYPES, tensor_bytes
from safecl.merging.memory import READ_BYTES
from safecl.merging.models.folder import FolderWeights
from safecl.merging.models.tensor_files import ReusedMemory, empty, rows_of
from safecl.storage.durable import DamagedCheckpoint, open_regular, read_into
from safecl.storage.safetensors_file import Tensor, num_bytes
from safecl.storage.untrusted import UnusableWeights

AVERAGE = "ema"


def is_checkpoint(path: str) -> bool:
    """Whether the path is a checkpoint in a run's folder."""
    return (Path(path).expanduser() / MANIFEST).is_file()


class CheckpointWeights:
    """The weights in a run's checkpoint; with `averaged` the average that the run keeps beside them.

    Every file's hash is checked when it is opened. Raises UnusableWeights where it is damaged, or of a LoRA run.
    """

    def __init__(self, path: str, label: str, averaged: bool):
        self.label, self.kind = label, AVERAGE if averaged else WEIGHTS
        self._memory: ReusedMemory | None = None
        self.folder = Path(path).expanduser().resolve()
        self.contents = _read(self.folder)
        if self.kind not in self.contents.manifest.kinds:
            raise UnusableWeights(f"{label}: holds no {self.kind}; it has {', '.join(self.contents.manifest.kinds)}")
        self.base = FolderWeights(_base_of(self.folder), f"the base of {label}")
        self.settings = self.base.settings
        parameters = self.contents.manifest.parameters
        if adapters := [name for name in parameters if ".lora_" in name]:
            raise UnusableWeights(f"{label}: is of a LoRA run ({adapters[0]}); merge adapters of saved models")
        dtypes = {name: tensor.dtype for name, tensor in self.base.stored.items()}
        usual = next(iter(dtypes.values()))
        self.stored: Mapping[str, Tensor] = {
            name: Tensor(dtypes.get(name, usual), shape, 0, num_bytes(dtypes.get(name, usual), shape))
            for name, shape in parameters.items()
        }
        self.shapes: Mapping[str, tuple[int, ...]] = parameters

    def close(self) -> None:
        self.base.close()

    def check_unchanged(self) -> None:
        """Do nothing: published checkpoints never change."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        shape = self.shapes[name]
        wanted = rows_of(shape, start, stop)
        target = empty(math.prod(wanted), self._memory)
        first = start * (math.prod(shape[1:]) if shape else 1)
        dtype = FLOAT_DTYPES[self.contents.manifest.kinds[self.kind]]
        for file, byte, element, count in ranges(self.contents.slices[self.kind, name], first, target.numel()):
            self._fill(file, byte, target[element : element + count], dtype)
        if not bool(target.isfinite().all()):
            raise UnusableWeights(f"{self.label}: {name} holds values that are not finite")
        return target.view(wanted)

    def _fill(self, file: str, byte: int, target: torch.Tensor, dtype: torch.dtype) -> None:
        step = READ_BYTES // dtype.itemsize
        with open_regular(self.folder / file) as opened:
            for begin in range(0, target.numel(), step):
                part = target[begin : begin + step]
                raw = torch.empty(part.numel(), dtype=dtype)
                read_into(opened, byte + begin * dtype.itemsize, tensor_bytes(raw))
                part.copy_(raw)

    def reuse(self, memory: ReusedMemory | None) -> None:
        """Let values be read into this memory; None: into new tensors."""
        self._memory = memory

    def raw(self, name: str) -> bytes:
        return bytes(tensor_bytes(self.read(name).view(-1)))

    def read_ahead(self, name: str) -> None:
        """Do nothing: the hashes have just been checked, so the system has the files in its cache where they fit."""

    def digest(self) -> str:
        """XXH3-128 of the checkpoint, over all its files."""
        hashes = "".join(f"{name} {record.xxh3_128}\n" for name, record in sorted(self.contents.manifest.files.items()))
        return str(xxhash.xxh3_128_hexdigest(hashes.encode()))

    def same_bytes(self, name: str, other: str) -> bool:
        return self.shapes[name] == self.shapes[other] and torch.equal(self.read(name), self.read(other))


def _read(folder: Path) -> Contents:
    try:
        contents = read_contents(folder)
        check_hashes(folder, contents.manifest)
    except DamagedCheckpoint as error:
        raise UnusableWeights(str(error)) from None
    return contents


def _base_of(folder: Path) -> str:
    """Return the base model of the run that a checkpoint belongs to."""
    config = folder.parent.parent / "config.yaml"
    try:
        named = parse_yaml(config.read_text(encoding="utf-8"))["model"]["path"]
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise UnusableWeights(f"{config}: does not name the run's base model ({type(error).__name__})") from None
    return str(named)
