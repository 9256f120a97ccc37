"""Fills the shared segment of a node once, or decides that the model's files are mapped instead."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
import xxhash

from safecl.distributed import devices, progress
from safecl.engine.reference import shared_memory
from safecl.engine.reference.layout import Layout, Where
from safecl.engine.reference.sources import Converter, Given, Reader, combine, refuse_nonfinite
from safecl.storage.untrusted import UnusableWeights

_FILLERS = 4


@dataclass(frozen=True)
class Offer:
    """The message of a node's first rank to the others: where the weights are."""

    where: str
    address: str = ""
    digest: str = ""
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def provide(layout: Layout, reader: Reader | Converter | Given, where: Where, stack: contextlib.ExitStack) -> Offer:
    """Make and fill the segment, or offer the files for mapping. For the first rank of a node."""
    obstacle = reader.obstacle_to_mapping()
    if where == "file":
        if obstacle is not None:
            raise UnusableWeights(f"the model's files cannot be mapped: {obstacle}")
        return _offer_files(reader)
    try:
        handle, digest = new_segment(layout, reader, stack)
    except shared_memory.NoRoom as error:
        if where == "segment" or obstacle is not None:
            raise UnusableWeights(
                f"{error}; the model's files cannot be mapped instead: {obstacle or 'where=segment'}"
            ) from None
        return _offer_files(reader, f"{error}: the model's files are mapped instead")
    return Offer("segment", shared_memory.address(handle), digest, reader.buffers())


def _offer_files(reader: Reader | Converter | Given, *notes: str) -> Offer:
    assert isinstance(reader, Reader), "a checkpoint that must be converted cannot be mapped"
    return Offer("file", "", reader.digest(), reader.buffers(), notes)


def new_segment(layout: Layout, reader: Reader | Converter | Given, stack: contextlib.ExitStack) -> tuple[int, str]:
    """Fill a segment with all parameters and seal it. Return (handle, digest); the stack closes the handle."""
    handle = shared_memory.create(layout.nbytes, "safecl-reference")
    stack.callback(os.close, handle)
    memory = shared_memory.map_segment(handle, layout.nbytes, writable=True)
    shared_memory.interleave(memory, shared_memory.numa_nodes())
    view = memoryview(memory)

    load = reader.loader()

    def fill(name: str) -> bytes:
        target = view[layout.offsets[name] : layout.offsets[name] + layout.num_bytes(name)]
        values = torch.frombuffer(target, dtype=layout.dtype) if target else torch.empty(0, dtype=layout.dtype)
        load(name, values)
        progress.beat()
        refuse_nonfinite(reader.path, name, values)
        return xxhash.xxh3_128(target).digest()

    with ThreadPoolExecutor(min(_FILLERS, os.cpu_count() or 1)) as pool:
        hashes = dict(zip(layout.shapes, pool.map(fill, layout.shapes), strict=True))
    reader.check_unchanged()
    view.release()
    memory.close()
    if not devices.on_gpu():
        shared_memory.seal(handle)
    return handle, combine(layout, hashes)


def tensor_view(memory: mmap.mmap, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """View the mapped bytes from `offset` on as a tensor."""
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)
