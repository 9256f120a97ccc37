"""Writes merged tensors as safetensors files, in the order and under the names of the first tuned model.

Tensors are computed in one thread and written in another, through a queue of few blocks.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from safecl.engine.model.dtypes import FLOAT_DTYPES, tensor_bytes
from safecl.merging.base import Unmergeable
from safecl.merging.memory import NUM_WAITING, WRITE_BYTES
from safecl.storage.durable import write_file
from safecl.storage.model_folder import INDEX, plan_files
from safecl.storage.safetensors_file import header_bytes, num_bytes

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """A tensor of the result: its dtype by the name in safetensors, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return num_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Written:
    """The number of weight files, and their bytes."""

    num_files: int
    num_bytes: int


def write_weights(
    folder: Path,
    entries: Mapping[str, Entry],
    values: Callable[[str], Iterable[torch.Tensor | bytes]],
    max_file_bytes: int,
) -> Written:
    """Write all tensors, and the index where there are several files.

    values: yields a tensor's values in order, as fp32 rows or as bytes. Raises OSError, and what `values` raises.
    """
    files = plan_files({name: entry.nbytes for name, entry in entries.items()}, max_file_bytes)
    total = 0
    for file, names in files.items():
        head = header_bytes({name: (entries[name].dtype, entries[name].shape) for name in names}, {"format": "pt"})
        blocks = _ahead(_blocks(names, entries, values))
        total += write_file(folder / file, _joined(head, blocks)).size
    if len(files) > 1:
        _write_index(folder, files, entries)
    return Written(len(files), total)


def _joined(head: bytes, blocks: Iterator[memoryview]) -> Iterator[bytes | memoryview]:
    yield head
    yield from blocks


def _blocks(
    names: Sequence[str], entries: Mapping[str, Entry], values: Callable[[str], Iterable[torch.Tensor | bytes]]
) -> Iterator[memoryview]:
    for name in names:
        for rows in values(name):
            if isinstance(rows, bytes):
                yield memoryview(rows)
                continue
            yield from _rounded(name, rows, FLOAT_DTYPES[entries[name].dtype])
            del rows  # before the next ones are computed


def _rounded(name: str, rows: torch.Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """Yield the bytes of fp32 values, rounded to nearest even."""
    flat, step = rows.reshape(-1), WRITE_BYTES // dtype.itemsize
    for start in range(0, flat.numel(), step):
        stored = flat[start : start + step].to(dtype, copy=True)  # the memory of the rows is used again
        if dtype == torch.float16 and not bool(stored.isfinite().all()):
            raise Unmergeable(
                f"{name}: the merged values are beyond 65,504, the largest number in fp16; use dtype=bf16"
            )
        yield tensor_bytes(stored)


_END = object()


def _ahead(values: Iterator[T]) -> Iterator[T]:
    """Yield the values, of which up to NUM_WAITING are computed in another thread before they are wanted."""
    with ThreadPoolExecutor(1) as pool:
        pending = deque(pool.submit(next, values, _END) for _ in range(NUM_WAITING))
        try:
            while (value := pending.popleft().result()) is not _END:
                pending.append(pool.submit(next, values, _END))
                yield value  # type: ignore[misc]  # the end of values is told by its identity
        finally:
            for each in pending:
                each.cancel()


def _write_index(folder: Path, files: Mapping[str, Sequence[str]], entries: Mapping[str, Entry]) -> None:
    places = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": sum(entry.nbytes for entry in entries.values())}, "weight_map": places}
    write_file(folder / INDEX, [json.dumps(index, indent=2).encode()])
