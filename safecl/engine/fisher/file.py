"""The diagonal Fisher of a model as a file: estimated once, loaded by every later run on that model in any topology.

It is one safetensors file, so any tool reads it. Its tensors have the names and shapes of the weights, in bf16: half
the bytes of fp32, and 0.4 % of rounding error is small against about 11 % of sampling error at 64 sign batches. The
header holds the settings of the estimate and the mean over all weights. A rank reads only the byte ranges that its own
shard needs.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from safecl.config import ConfigError
from safecl.distributed import collectives
from safecl.engine.model.dtypes import tensor_bytes
from safecl.engine.zero.optimizer import ShardAdamW
from safecl.engine.zero.shards import ShardMap
from safecl.storage.durable import DamagedCheckpoint, open_regular, read_into, sync_folder, write_file
from safecl.storage.safetensors_file import Tensor, header_bytes, read_header
from safecl.storage.sizes import free_bytes

FORMAT_VERSION = 1
_KEY = "safecl-fisher"
_DTYPE = "BF16"
_CHUNK = 1 << 23


@dataclass(frozen=True)
class FisherHeader:
    """The model, the rows and the settings that a Fisher was estimated with.

    mean: mean of F over all weights; a penalty's strength is divided by it. estimator: `random signs`, or `exact` (each
    row's own gradient). rows: fingerprint of the `num_rows` rows of memory.source. memory: settings that decide which
    of them the memory holds. model: its path, for people. model_hash, tokenizer: hashes. mode: the model's mode in the
    estimate; files that do not say it were made in training mode, with dropout where the model has some.
    """

    mean: float
    num_weights: int
    estimator: str
    sign_batches: int
    rows_per_batch: int
    seed: int
    num_rows: int
    rows: str
    model: str
    model_hash: str
    dtype: str
    tokenizer: str = ""
    memory: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    mode: str = "training"
    format_version: int = FORMAT_VERSION

    def key(self) -> dict[str, str | int]:
        """The fields that the numbers depend on."""
        settings = ("estimator", "sign_batches", "rows_per_batch", "seed", "mode", "format_version")
        return {name: getattr(self, name) for name in ("model_hash", "tokenizer", "dtype", "rows", "memory", *settings)}

    def differences(self, other: FisherHeader) -> list[str]:
        """Describe each field of the key that differs."""
        mine, theirs = self.key(), other.key()
        return [f"{name} {mine[name]} there, {theirs[name]} here" for name in mine if mine[name] != theirs[name]]


@dataclass(frozen=True)
class FisherFile:
    """An opened file: its header, and the place of each weight's values."""

    path: Path
    header: FisherHeader
    tensors: Mapping[str, Tensor]

    def check_weights(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ConfigError with the name of the first weight that is missing or has another shape."""
        for name, shape in shapes.items():
            if name not in self.tensors:
                raise ConfigError(
                    f"{self.path}: holds no Fisher of {name}; it was made for another model ({self.header.model})"
                )
            if self.tensors[name].shape != tuple(shape):
                there, here = list(self.tensors[name].shape), list(shape)
                raise ConfigError(
                    f"{self.path}: {name} has shape {there} there and {here} in this model; it was made for another "
                    "model"
                )

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read elements [start, stop) of a weight's Fisher: 1-D, bf16, on the CPU. Raises ConfigError where the file is
        damaged."""
        values = torch.empty(stop - start, dtype=torch.bfloat16)
        try:
            with open_regular(self.path) as file:
                read_into(file, self.tensors[name].position + 2 * start, tensor_bytes(values))
        except DamagedCheckpoint as error:
            raise ConfigError(str(error)) from None
        self._check_values(name, values)
        return values

    def check_values(self) -> None:
        """Read all of the file. Raises ConfigError for a value that no Fisher information has."""
        for name, tensor in self.tensors.items():
            for start in range(0, tensor.nbytes // 2, _CHUNK):
                self.read(name, start, min(start + _CHUNK, tensor.nbytes // 2))

    def _check_values(self, name: str, values: torch.Tensor) -> None:
        if not values.numel():
            return
        low, high = torch.aminmax(values)
        if not (0 <= low and high < math.inf):  # False for NaN, too
            wrong = int((~((values >= 0) & (values < math.inf))).sum())
            raise ConfigError(
                f"{self.path}: {name} holds NaN, infinite or negative values ({wrong:,} of the {values.numel():,} that "
                "were read), and a mean of squares has none of these; estimate it anew with `safecl fisher CFG`"
            )


def open_fisher(path: str | Path) -> FisherFile:
    """Open a file and read its header. Raises ConfigError where it is missing, damaged, or no Fisher file.

    `FisherFile.read` refuses values that are NaN, infinite or negative.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; `safecl fisher CFG` estimates the Fisher information and writes one")
    try:
        tensors, metadata = read_header(path.resolve())
        header = FisherHeader(**json.loads(metadata[_KEY]))
    except DamagedCheckpoint as error:
        raise ConfigError(f"{error}; estimate it anew with `safecl fisher CFG`") from None
    except (KeyError, ValueError, TypeError):
        raise ConfigError(f"{path}: not a Fisher file; `safecl fisher CFG` writes one") from None
    if header.format_version != FORMAT_VERSION:
        raise ConfigError(f"{path}: format version {header.format_version}, this safecl reads version {FORMAT_VERSION}")
    if not 0 < header.mean < math.inf:
        raise ConfigError(
            f"{path}: its mean is {header.mean}, which no Fisher has; estimate it anew with `safecl fisher CFG`"
        )
    if wrong := [name for name, tensor in tensors.items() if tensor.dtype != _DTYPE]:
        raise ConfigError(f"{path}: {wrong[0]} is {tensors[wrong[0]].dtype}, a Fisher file holds {_DTYPE}")
    return FisherFile(path.resolve(), header, tensors)


def refuse_other_model(fisher: FisherFile, model: str, model_hash: str) -> None:
    """Raise ConfigError where the file was made for other weights than those of `model`."""
    if fisher.header.model_hash != model_hash:
        raise ConfigError(
            f"{fisher.path}: made for {fisher.header.model} (weights {fisher.header.model_hash[:12]}), and model.path "
            f"is {model} (weights {model_hash[:12]}); estimate it for this model with `safecl fisher CFG`"
        )


def load_fisher(fisher: FisherFile, shards: ShardMap, optimizer: ShardAdamW, kind: str) -> None:
    """Load this rank's part of the file into the state `kind`, in that state's place and dtype. A collective call.
    Raises ConfigError on all ranks."""
    fisher.check_weights(shards.shapes)
    values = [torch.zeros(flat.shape, dtype=torch.bfloat16) for flat in shards.flats]

    def read() -> None:
        for fragment in shards.fragments:
            shards.view(fragment, values).copy_(
                fisher.read(fragment.name, fragment.offset, fragment.offset + fragment.length)
            )

    collectives.on_every_rank(read, (ConfigError, OSError), ConfigError)
    for shard, own in zip(optimizer.shards(), values, strict=True):
        shard.keep(kind, own)
    optimizer.fisher_means[kind] = fisher.header.mean


# -------------------------------------------------------------------------------------------------------------- writing


def write_fisher(path: Path, header: FisherHeader, shards: ShardMap, tensors: list[torch.Tensor]) -> None:
    """Write the state `tensors`, flat like the shards, one weight at a time, and publish the file by rename. A
    collective call.

    Raises ConfigError on all ranks where the file cannot be written; an older file is then kept.
    """
    names = {name: (_DTYPE, shape) for name, shape in shards.shapes.items()}
    head = header_bytes(names, {_KEY: json.dumps(dataclasses.asdict(header))})
    parts = _parts(shards, tensors)

    def write() -> None:
        problem: OSError | None = None
        if collectives.rank() == 0:
            try:
                _write(path, head, parts, 2 * shards.numel)
            except OSError as error:
                problem = error
        for _ in parts:  # the reads are collective, so every rank makes all of them, also after the disk is full
            pass
        if problem is not None:
            raise problem

    collectives.on_every_rank(write, (OSError,), lambda problem: ConfigError(f"{path}: {problem}"))


def _parts(shards: ShardMap, tensors: list[torch.Tensor]) -> Iterator[memoryview]:
    for name in shards.shapes:
        yield tensor_bytes(shards.read(name, tensors).to(torch.bfloat16).contiguous().view(-1))


def _write(path: Path, head: bytes, parts: Iterator[memoryview], num_bytes: int) -> None:
    """Write and publish the file. Raises OSError with a message that says what is wrong."""
    partial = path.with_name(f".{path.name}.partial")
    if (free := free_bytes(path.parent)) < num_bytes:
        raise OSError(f"needs {num_bytes / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        write_file(partial, itertools.chain([head], parts), label=path.name)
        os.replace(partial, path)
        sync_folder(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(f"cannot be written: {error.strerror or error}") from None
        raise
