"""Writes the live model as a Hugging Face model folder: streamed parameter by parameter, read back and compared, and
published by rename. A tensor that is not finite is refused.

Memory: sharded parameters are gathered on every rank, one at a time, and rank 0 writes each in blocks of 16 MiB.
Besides the training's memory no rank holds more than two of the largest parameters (gloo gathers through a second
buffer) and 32 MB: freed buffers that the allocator has not given back yet (two of 8 MiB in all), and a block. The size
and number of files do not matter.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch

from safecl.distributed import collectives, progress
from safecl.engine.checkpoint.model_settings import save_settings
from safecl.engine.model.adapters import base_model
from safecl.engine.model.dtypes import DTYPE_NAMES, tensor_bytes
from safecl.engine.model.tensor_names import saved_names
from safecl.engine.passes.training_engine import TrainingEngine
from safecl.kernels.finite import count_nonfinite
from safecl.storage.durable import BLOCK_BYTES, DamagedCheckpoint, FileRecord, hash_file, sync_folder, write_file
from safecl.storage.model_folder import INDEX, plan_files
from safecl.storage.safetensors_file import header_bytes, num_bytes, read_header
from safecl.storage.sizes import format_bytes, free_bytes, give_back_freed_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")

MAX_FILE_BYTES = 2 * 2**30
CARD = "README.md"
FREED_BYTES = 8 * 2**20


class Tokenizer(Protocol):
    """A tokenizer of transformers."""

    def save_pretrained(self, save_directory: Path) -> object: ...


class ExportFailed(RuntimeError):
    """A model folder could not be written, or differs from what was written. An older folder of the name is
    untouched."""


class ModelNotFinite(ExportFailed):
    """A tensor of the model holds values that are NaN or infinite; it is handed over to nobody."""


_NOT_FINITE = "are not finite (NaN or infinite)"


class _NotFinite(ValueError):
    """The same on the rank that writes."""


@dataclass(frozen=True)
class Exported:
    """The contents of a model folder: numbers of tensors, weight files and their bytes. All were read back and had the
    right hashes."""

    num_tensors: int
    num_files: int
    num_bytes: int

    def __str__(self) -> str:
        files = f"{self.num_files} file{'s' * (self.num_files != 1)}"
        return f"{self.num_tensors} tensors in {files}, {format_bytes(self.num_bytes)}, read back and verified"


def save_model(
    engine: TrainingEngine,
    tokenizer: Tokenizer | None,
    folder: Path,
    max_file_bytes: int = MAX_FILE_BYTES,
    *,
    card: str | None = None,
) -> Exported:
    """Write the live weights in the model's dtype, config, generation config, tokenizer and chat template. A
    collective call.

    `card` is the text of the folder's README.md. With LoRA the folder holds the adapter only.
    `AutoModelForCausalLM.from_pretrained(folder)` (or peft) loads it. The folder appears when everything in it is on
    the disk and verified; an older one of the name is replaced. Raises ExportFailed on all ranks,
    ModelNotFinite for a tensor that is not finite.
    """
    model, partial = cast("PreTrainedModel", engine.module.model), folder.with_name(f".{folder.name}.partial")
    is_adapter = hasattr(model, "peft_config")
    tensors = _Tensors(engine, trained_only=is_adapter)
    _on_first_rank(lambda: _begin(partial, tensors.num_bytes))
    if is_adapter:
        exported = _on_first_rank(_save_adapter(engine, tensors, partial))
    else:
        exported = _on_first_rank(_save_weights(tensors, partial, max_file_bytes))
        _on_first_rank(lambda: save_settings(model, partial))
    if tokenizer is not None:
        _on_first_rank(lambda: tokenizer.save_pretrained(partial) and None)
    if card is not None:
        _on_first_rank(lambda: (partial / CARD).write_text(card, encoding="utf-8") and None)
    _on_first_rank(lambda: _publish(partial, folder))
    return exported


def save_plain(engine: TrainingEngine, folder: Path, max_file_bytes: int = MAX_FILE_BYTES) -> Exported:
    """Write a folder for a teacher: the live weights and the model's settings only. Not for LoRA. A collective
    call."""
    return save_model(engine, None, folder, max_file_bytes)


def _on_first_rank(work: Callable[[], T]) -> T:
    """Do the work on rank 0 and return its value on all ranks; where it fails, raise ExportFailed on all."""
    return collectives.on_first_rank(work, (OSError, ValueError), _failure)  # DamagedCheckpoint is a ValueError


def _failure(problem: str) -> ExportFailed:
    kind = ModelNotFinite if problem.endswith(_NOT_FINITE) else ExportFailed
    return kind(f"the model could not be saved: {problem}; the same command goes on from the last checkpoint")


def _begin(partial: Path, size: int) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if (free := free_bytes(partial)) < size:
        partial.rmdir()
        raise OSError(f"{partial.parent}: it takes {format_bytes(size)} and {format_bytes(free)} are free")


def _publish(partial: Path, folder: Path) -> None:
    """Put the folder in the place of an older one. Where the process dies between the two renames, the older one is
    still there under its hidden name."""
    for path in partial.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(partial)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(partial, folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


# -------------------------------------------------------------------------------------------------------------- tensors


class _Tensors:
    """The parameters of a model and the buffers that a checkpoint holds; their values come one at a time."""

    def __init__(self, engine: TrainingEngine, trained_only: bool):
        self.engine = engine
        named = engine.module.model.named_parameters()
        self.parameters = {name: p for name, p in named if p.requires_grad or not trained_only}
        self.buffers = {} if trained_only else dict(_saved_buffers(base_model(engine.module.model)))
        self.shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self.parameters.items()}
        self.shapes |= {name: tuple(buffer.shape) for name, buffer in self.buffers.items()}
        own = {name: name for name in self.shapes}
        self.saved_names = own if trained_only else saved_names(base_model(engine.module.model), self.shapes)
        """The name of each tensor in a file: the one that `save_pretrained` writes."""

    def kind(self, name: str) -> tuple[str, tuple[int, ...]]:
        """The dtype by its name in safetensors, and the shape."""
        tensor = self.parameters[name] if name in self.parameters else self.buffers[name]
        return DTYPE_NAMES[tensor.dtype], self.shapes[name]

    def size(self, name: str) -> int:
        return num_bytes(*self.kind(name))

    @property
    def num_bytes(self) -> int:
        return sum(map(self.size, self.shapes))

    def values(self, names: list[str]) -> Iterator[torch.Tensor | None]:
        """Yield whole tensors on rank 0, each valid until the next, and None elsewhere. Every rank must take all."""
        freed = 0
        for name in names:
            progress.beat()
            freed += self.size(name)
            if freed > FREED_BYTES:
                give_back_freed_memory()
                freed = self.size(name)
            if name in self.buffers:
                yield self.buffers[name].detach() if collectives.rank() == 0 else None
                continue
            with self.engine.shards.full_parameter(self.parameters[name]):
                yield self.parameters[name].detach() if collectives.rank() == 0 else None


def _saved_buffers(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    saved = set(model.state_dict().keys()) - set(model._keys_to_ignore_on_save or ())
    return [(name, buffer) for name, buffer in model.named_buffers() if name in saved]


# ---------------------------------------------------------------------------------------------------------------- files


def _save_weights(tensors: _Tensors, partial: Path, max_file_bytes: int) -> Callable[[], Exported]:
    """Write the files on rank 0, to which all ranks gather the tensors. The returned function verifies the files on
    rank 0, or raises the error of writing them."""
    files = plan_files({name: tensors.size(name) for name in tensors.shapes}, max_file_bytes)
    records: dict[str, FileRecord] = {}
    problem: OSError | _NotFinite | None = None
    for file, names in files.items():
        values = tensors.values(names)
        if collectives.rank() == 0 and problem is None:
            try:
                records[file] = write_file(partial / file, _parts(tensors, names, values))
            except (OSError, _NotFinite) as error:
                problem = error
        for _ in values:  # every rank takes part in gathering, also in that of tensors that a full disk has left over
            pass

    def finish() -> Exported:
        if problem is not None:
            shutil.rmtree(partial, ignore_errors=True)
            raise problem
        if len(files) > 1:
            _write_index(partial, files, tensors)
        return _verify(partial, files, records, tensors)

    return finish


def _parts(tensors: _Tensors, names: list[str], values: Iterator[torch.Tensor | None]) -> Iterator[bytes | memoryview]:
    yield header_bytes({tensors.saved_names[name]: tensors.kind(name) for name in names}, {"format": "pt"})
    for name, value in zip(names, values, strict=False):  # a strict zip would gather once more than other ranks
        assert value is not None, "rank 0 has whole tensors"
        _refuse_nonfinite(tensors.saved_names[name], value)
        for block in value.reshape(-1).view(torch.uint8).split(BLOCK_BYTES):
            yield tensor_bytes(block.cpu())


def _refuse_nonfinite(name: str, value: torch.Tensor) -> None:
    """Raise _NotFinite for a tensor with NaN or infinite values."""
    if count := count_nonfinite(value):
        raise _NotFinite(f"{count:,} of the {value.numel():,} values of {name} {_NOT_FINITE}")


def _write_index(partial: Path, files: dict[str, list[str]], tensors: _Tensors) -> None:
    weight_map = {tensors.saved_names[name]: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": tensors.num_bytes}, "weight_map": weight_map}
    (partial / INDEX).write_text(json.dumps(index, indent=2))


def _verify(partial: Path, files: dict[str, list[str]], records: dict[str, FileRecord], tensors: _Tensors) -> Exported:
    """Read everything back. Raises DamagedCheckpoint where tensors are missing, have another shape or dtype, or other
    bytes than were written."""
    for file, names in files.items():
        found, _ = read_header(partial / file)
        if {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} != {
            tensors.saved_names[name]: tensors.kind(name) for name in names
        }:
            raise DamagedCheckpoint(f"{partial / file}: holds other tensors than were written")
        if hash_file(partial / file, from_disk=True) != records[file].xxh3_128:
            raise DamagedCheckpoint(f"{partial / file}: read back, its bytes are not those that were written")
    return Exported(len(tensors.shapes), len(files), sum(record.size for record in records.values()))


def _save_adapter(engine: TrainingEngine, tensors: _Tensors, partial: Path) -> Callable[[], Exported]:
    """Gather the adapters, which are small, on rank 0. The returned function lets peft write them and compares them."""
    state: dict[str, torch.Tensor] = {}
    names = list(tensors.shapes)
    for name, value in zip(names, tensors.values(names), strict=True):
        if value is not None:
            state[name] = value.to("cpu", copy=True).contiguous()

    def finish() -> Exported:
        from safetensors.torch import load_file

        for name, value in state.items():
            _refuse_nonfinite(name, value)

        # Without save_embedding_layers=False peft adds the base's embedding where that has an adapter.
        adapted = cast(Any, engine.module.model)
        adapted.save_pretrained(partial, state_dict=state, safe_serialization=True, save_embedding_layers=False)
        path = partial / "adapter_model.safetensors"
        found = load_file(path)
        bare = {name.replace(".default", ""): value for name, value in state.items()}
        if found.keys() != bare.keys() or not all(torch.equal(found[name], value) for name, value in bare.items()):
            raise DamagedCheckpoint(f"{path}: read back, it is not what was written")
        return Exported(len(found), 1, path.stat().st_size)

    return finish
