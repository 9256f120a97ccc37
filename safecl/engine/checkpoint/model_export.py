"""A Hugging Face model folder from the live model, streamed parameter by parameter, read back and compared, and
published by rename.

Memory: where parameters are sharded every rank gathers one at a time, and rank 0 writes it from where it lies, in
blocks of 16 MiB. Beyond what training keeps no rank holds more than two of the largest parameters (gloo gathers through
a second buffer) and 32 MB: the buffers that were freed since the allocator last gave them back (two of 8 MiB in all),
and a block. Size and number of files do not matter.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from safecl.distributed import collectives
from safecl.engine.checkpoint.folder import format_bytes
from safecl.engine.model.adapters import base_model
from safecl.engine.model.dtypes import DTYPE_NAMES
from safecl.engine.passes.training_engine import TrainingEngine
from safecl.storage.durable import BLOCK_BYTES, DamagedCheckpoint, FileRecord, hash_file, sync_folder, write_file
from safecl.storage.safetensors_file import header_bytes, num_bytes, read_header

MAX_FILE_BYTES = 2 * 2**30
CARD = "README.md"
FREED_BYTES = 8 * 2**20
INDEX = "model.safetensors.index.json"


class ExportFailed(RuntimeError):
    """A model folder could not be written, or is not what was meant to be written. An older folder of the name is
    untouched."""


@dataclass(frozen=True)
class Exported:
    """What a model folder holds: tensors, weight files, their bytes. All were read back and had the hashes of what was
    written."""

    num_tensors: int
    num_files: int
    num_bytes: int

    def __str__(self) -> str:
        files = f"{self.num_files} file{'s' * (self.num_files != 1)}"
        return f"{self.num_tensors} tensors in {files}, {format_bytes(self.num_bytes)}, read back and verified"


def save_model(
    engine: TrainingEngine, tokenizer, folder: Path, max_file_bytes: int = MAX_FILE_BYTES, *, card: str | None = None
) -> Exported:
    """Writes the live weights in the model's dtype, config, generation config, tokenizer and chat template. A
    collective call.

    `card` is the text of the folder's README.md.

    With LoRA the folder holds the adapter only. `AutoModelForCausalLM.from_pretrained(folder)` (or peft) loads it. The
    folder appears when everything in it is on the disk and verified; an older one of the name is replaced. Raises
    ExportFailed on all ranks.
    """
    model, partial = engine.module.model, folder.with_name(f".{folder.name}.partial")
    is_adapter = hasattr(model, "peft_config")
    tensors = _Tensors(engine, trained_only=is_adapter)
    _agree(lambda: _begin(partial, tensors.num_bytes))
    if is_adapter:
        exported = _agree(_save_adapter(engine, tensors, partial))
    else:
        exported = _agree(_save_weights(tensors, partial, max_file_bytes))
        _agree(lambda: _save_settings(model, partial))
    if tokenizer is not None:
        _agree(lambda: tokenizer.save_pretrained(partial))
    if card is not None:
        _agree(lambda: (partial / CARD).write_text(card, encoding="utf-8") and None)
    _agree(lambda: _publish(partial, folder))
    return exported


def save_plain(engine: TrainingEngine, folder: Path, max_file_bytes: int = MAX_FILE_BYTES) -> Exported:
    """The live weights and the model's settings, nothing else: a folder for a teacher. Not for LoRA. A collective
    call."""
    return save_model(engine, None, folder, max_file_bytes)


def _agree(work: Callable[[], object]) -> object:
    """What the work gives on rank 0, on all ranks; where it fails there, ExportFailed on all of them."""
    value, problem = None, None
    if collectives.rank() == 0:
        try:
            value = work()
        except (OSError, ValueError) as error:  # DamagedCheckpoint is one
            problem = f"the model could not be saved: {error}; the same command goes on from the last checkpoint"
    value, problem = collectives.gather_objects([(value, problem)])[0]
    if problem is not None:
        raise ExportFailed(problem)
    return value


def _begin(partial: Path, size: int) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if (free := shutil.disk_usage(partial).free) < size:
        partial.rmdir()
        raise OSError(f"{partial.parent}: it takes {format_bytes(size)} and {format_bytes(free)} are free")


def _save_settings(model: torch.nn.Module, partial: Path) -> None:
    model.config.save_pretrained(partial)
    if model.can_generate():
        model.generation_config.save_pretrained(partial)


def _publish(partial: Path, folder: Path) -> None:
    """Puts the folder in the place of an older one; where a process dies between the two renames the older one is still
    there, hidden."""
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
    """Parameters, then buffers that a checkpoint holds: first their shapes, then their values, one at a time."""

    def __init__(self, engine: TrainingEngine, trained_only: bool):
        self.engine = engine
        named = engine.module.model.named_parameters()
        self.parameters = {name: p for name, p in named if p.requires_grad or not trained_only}
        self.buffers = {} if trained_only else dict(_saved_buffers(base_model(engine.module.model)))
        self.shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self.parameters.items()}
        self.shapes |= {name: tuple(buffer.shape) for name, buffer in self.buffers.items()}

    def kind(self, name: str) -> tuple[str, tuple[int, ...]]:
        """dtype as safetensors names it, and shape."""
        tensor = self.parameters[name] if name in self.parameters else self.buffers[name]
        return DTYPE_NAMES[tensor.dtype], self.shapes[name]

    def size(self, name: str) -> int:
        return num_bytes(*self.kind(name))

    @property
    def num_bytes(self) -> int:
        return sum(map(self.size, self.shapes))

    def values(self, names: list[str]) -> Iterator[torch.Tensor | None]:
        """Whole tensors on rank 0, None elsewhere, each until the next is taken; every rank must take all of them."""
        freed = 0
        for name in names:
            freed += self.size(name)
            if freed > FREED_BYTES:
                give_back_freed_memory()
                freed = self.size(name)
            if name in self.buffers:
                yield self.buffers[name].detach() if collectives.rank() == 0 else None
                continue
            with self.engine.shards.full_parameter(self.parameters[name]):
                yield self.parameters[name].detach() if collectives.rank() == 0 else None


def give_back_freed_memory() -> None:
    """Hands what this process has freed back to the system. glibc keeps buffers of some MB, and as long as anything
    small that lives lies between them it takes new memory for the next ones."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _saved_buffers(model: torch.nn.Module):
    saved = set(model.state_dict().keys())
    return [(name, buffer) for name, buffer in model.named_buffers() if name in saved]


# ---------------------------------------------------------------------------------------------------------------- files


def plan_files(tensors: _Tensors, max_file_bytes: int) -> dict[str, list[str]]:
    """File name -> names of its tensors, in the layout of transformers: files of at most `max_file_bytes`, or of one
    larger tensor."""
    groups: list[list[str]] = [[]]
    pending = 0
    for name in tensors.shapes:
        if groups[-1] and pending + tensors.size(name) > max_file_bytes:
            groups.append([])
            pending = 0
        groups[-1].append(name)
        pending += tensors.size(name)
    count = len(groups)
    if count == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i + 1:05d}-of-{count:05d}.safetensors": names for i, names in enumerate(groups)}


def _save_weights(tensors: _Tensors, partial: Path, max_file_bytes: int) -> Callable[[], Exported]:
    """Writes the files on rank 0 with the help of all; what it returns verifies them there, or raises what went
    wrong."""
    files = plan_files(tensors, max_file_bytes)
    records: dict[str, FileRecord] = {}
    problem: OSError | None = None
    for file, names in files.items():
        values = tensors.values(names)
        if collectives.rank() == 0 and problem is None:
            try:
                records[file] = write_file(partial / file, _parts(tensors, names, values))
            except OSError as error:
                problem = error
        for _ in values:  # every rank takes part in gathering what is left, also when the disk is full
            pass

    def finish() -> Exported:
        if problem is not None:
            raise problem
        if len(files) > 1:
            _write_index(partial, files, tensors)
        return _verify(partial, files, records, tensors)

    return finish


def _parts(tensors: _Tensors, names: list[str], values: Iterator[torch.Tensor | None]) -> Iterator[bytes | memoryview]:
    yield header_bytes({name: tensors.kind(name) for name in names}, {"format": "pt"})
    for value in values:
        for block in value.reshape(-1).view(torch.uint8).split(BLOCK_BYTES):
            yield memoryview(block.cpu().numpy())


def _write_index(partial: Path, files: dict[str, list[str]], tensors: _Tensors) -> None:
    weight_map = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": tensors.num_bytes}, "weight_map": weight_map}
    (partial / INDEX).write_text(json.dumps(index, indent=2))


def _verify(partial: Path, files: dict[str, list[str]], records: dict[str, FileRecord], tensors: _Tensors) -> Exported:
    """Reads everything back. DamagedCheckpoint where tensors are missing, have another shape or dtype, or other bytes
    than were written."""
    for file, names in files.items():
        found, _ = read_header(partial / file)
        if {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} != {
            name: tensors.kind(name) for name in names
        }:
            raise DamagedCheckpoint(f"{partial / file}: holds other tensors than were written")
        if hash_file(partial / file, from_disk=True) != records[file].xxh3_128:
            raise DamagedCheckpoint(f"{partial / file}: read back, its bytes are not those that were written")
    return Exported(len(tensors.shapes), len(files), sum(record.size for record in records.values()))


def _save_adapter(engine: TrainingEngine, tensors: _Tensors, partial: Path) -> Callable[[], Exported]:
    """Adapters are small: rank 0 gathers them whole, peft writes them, and each is compared with what was gathered."""
    names = list(tensors.shapes)
    copies = (value.to("cpu", copy=True).contiguous() if value is not None else None for value in tensors.values(names))
    state = dict(zip(names, copies, strict=True))

    def finish() -> Exported:
        from safetensors.torch import load_file

        engine.module.model.save_pretrained(partial, state_dict=state, safe_serialization=True)
        path = partial / "adapter_model.safetensors"
        found = load_file(path)
        bare = {name.replace(".default.", "."): value for name, value in state.items()}
        if found.keys() != bare.keys() or not all(torch.equal(found[name], value) for name, value in bare.items()):
            raise DamagedCheckpoint(f"{path}: read back, it is not what was written")
        return Exported(len(found), 1, path.stat().st_size)

    return finish
