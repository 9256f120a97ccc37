"""Tensors in safetensors files, read by ranges in fp32.

A tensor is read in blocks of 1 MiB, which stay in a core's cache while they are hashed and converted into their place.
So a read holds the fp32 values and one block.
Every byte is hashed on its first way through, so the digest of all tensors costs no further reading.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import torch
import xxhash

from safecl.engine.model.dtypes import FLOAT_DTYPES, tensor_bytes
from safecl.merging.memory import READ_BYTES
from safecl.storage.durable import DamagedCheckpoint, open_regular, read_into
from safecl.storage.model_folder import ModelFiles, Stamp
from safecl.storage.safetensors_file import Tensor, read_header
from safecl.storage.untrusted import UnusableWeights


class ReusedMemory:
    """fp32 memory in two sets of buffers. What was read into one set stays while the other one is filled.

    A fresh page costs more than the reading and the conversion of what goes into it.
    """

    def __init__(self) -> None:
        self._sets: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        self._number = self._used = 0

    def turn(self) -> None:
        """Begin to fill the other set from its first buffer on."""
        self._number, self._used = 1 - self._number, 0

    def take(self, numel: int) -> torch.Tensor:
        """Return the set's next buffer, cut to so many elements."""
        buffers, index = self._sets[self._number], self._used
        self._used += 1
        if index == len(buffers):
            buffers.append(torch.empty(0))
        if buffers[index].numel() < numel:
            buffers[index] = torch.empty(0)  # frees the smaller one first
            buffers[index] = torch.empty(numel)
        return buffers[index][:numel]


def empty(numel: int, memory: ReusedMemory | None) -> torch.Tensor:
    """Return an fp32 tensor for values: of this memory, or a new one."""
    return torch.empty(numel) if memory is None else memory.take(numel)


class TensorFiles:
    """The tensors of one model's or adapter's files. `label` says in messages whose they are."""

    def __init__(self, files: ModelFiles, label: str):
        self.files, self.label = files, label
        self.stored: dict[str, Tensor] = {name: tensor for name, (_, tensor) in files.tensors.items()}
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tensor.shape for name, tensor in self.stored.items()}
        self._handles: dict[Path, FileIO] = {}
        self._hashes: dict[str, tuple[Any, int]] = {}
        self._block = bytearray(READ_BYTES)
        self._memory: ReusedMemory | None = None

    def close(self) -> None:
        """Close the files; they are opened again where something is read."""
        for handle in self._handles.values():
            handle.close()
        self._handles.clear()

    def reuse(self, memory: ReusedMemory | None) -> None:
        """Let values be read into this memory; None: into new tensors."""
        self._memory = memory

    def check_unchanged(self) -> None:
        """Raise UnusableWeights where a file has changed since its header was read."""
        self.files.check_unchanged()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        stored = self.stored[name]
        if stored.dtype not in FLOAT_DTYPES:
            raise UnusableWeights(f"{self.label}: {name} is stored as {stored.dtype}, not as {', '.join(FLOAT_DTYPES)}")
        shape = rows_of(stored.shape, start, stop)
        target = empty(math.prod(shape), self._memory)
        first = start * (math.prod(stored.shape[1:]) if stored.shape else 1)
        dtype = FLOAT_DTYPES[stored.dtype]
        step = READ_BYTES // dtype.itemsize
        for begin in range(0, target.numel(), step):
            part = target[begin : begin + step]
            raw = part if dtype == torch.float32 else self._scratch(part.numel(), dtype)
            self._fill(name, (first + begin) * dtype.itemsize, tensor_bytes(raw))
            if raw is not part:
                part.copy_(raw)
            if not math.isfinite(float(part.sum())) and not bool(part.isfinite().all()):
                raise UnusableWeights(f"{self.label}: {name} holds values that are not finite")
        return target.view(shape)

    def raw(self, name: str) -> bytes:
        """Return the bytes of a small tensor of any dtype."""
        found = bytearray(self.stored[name].nbytes)
        self._fill(name, 0, memoryview(found))
        return bytes(found)

    def head(self, name: str, count: int) -> bytes:
        """Return the first bytes of a tensor, at most `count`."""
        found = bytearray(min(count, self.stored[name].nbytes))
        self._fill(name, 0, memoryview(found))
        return bytes(found)

    def read_ahead(self, name: str) -> None:
        """Ask the system to read a tensor into its own cache, while others are worked on."""
        path, stored = self.files.tensors[name]
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._open(path).fileno(), stored.position, stored.nbytes, os.POSIX_FADV_WILLNEED)

    def digest(self) -> str:
        """XXH3-128 of all weights, as a run's own digest of its base model where the dtypes are one. Bytes that were
        not read yet are read."""
        dtypes = {tensor.dtype for tensor in self.stored.values() if tensor.dtype in FLOAT_DTYPES}
        only = str(FLOAT_DTYPES[dtypes.pop()]) if len(dtypes) == 1 else "mixed"
        whole = xxhash.xxh3_128(only.encode())
        for name in sorted(self.stored):
            whole.update(name.encode() + self._digest_of(name))
        return str(whole.hexdigest())

    def same_bytes(self, name: str, other: str) -> bool:
        """Whether two tensors of this model have the same bytes."""
        mine, theirs = self.stored[name], self.stored[other]
        if (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
            return False
        return bool(self._digest_of(name) == self._digest_of(other))

    def _digest_of(self, name: str) -> bytes:
        digest, position = self._hashes.get(name, (None, 0))
        size = self.stored[name].nbytes
        while digest is None or position < size:
            part = memoryview(self._block)[: min(READ_BYTES, size - position)]
            self._fill(name, position, part)
            digest, position = self._hashes[name]
        found: bytes = digest.digest()
        return found

    def _fill(self, name: str, offset: int, target: memoryview) -> None:
        """Read bytes of a tensor from `offset` on, and add those to its hash that follow the hashed ones."""
        path, stored = self.files.tensors[name]
        try:
            read_into(self._open(path), stored.position + offset, target)
        except (DamagedCheckpoint, OSError) as error:
            raise UnusableWeights(f"{path}: {error}") from None
        digest, position = self._hashes.get(name) or (xxhash.xxh3_128(), 0)
        if offset == position:
            digest.update(target)
            self._hashes[name] = digest, position + len(target)

    def _open(self, path: Path) -> FileIO:
        if path not in self._handles:
            opened = open_regular(path.resolve())
            if self._handles.setdefault(path, opened) is not opened:  # another thread was faster
                opened.close()
        return self._handles[path]

    def _scratch(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.frombuffer(self._block, dtype=dtype, count=numel)


def rows_of(shape: tuple[int, ...], start: int, stop: int | None) -> tuple[int, ...]:
    """Return the shape of rows [start, stop) of a tensor; one of no dimensions has no rows, and stays whole."""
    return (len(range(*slice(start, stop).indices(shape[0]))), *shape[1:]) if shape else ()


def open_file(path: Path, label: str) -> TensorFiles:
    """Open one safetensors file. Raises UnusableWeights where it is missing or damaged."""
    if not path.is_file():
        raise UnusableWeights(f"{path}: no such file")
    try:
        stamp = Stamp.of(path)
        tensors, _ = read_header(path.resolve())
    except (DamagedCheckpoint, OSError) as error:
        raise UnusableWeights(f"{error}: the file is damaged or was not copied in full") from None
    return TensorFiles(ModelFiles({name: (path, tensor) for name, tensor in tensors.items()}, {path: stamp}), label)
