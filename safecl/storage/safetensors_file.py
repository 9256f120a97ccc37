"""safetensors files, written as a stream and read by ranges, so that no process holds a whole one. Imports no torch.

    8 bytes: length of the header | JSON header {name: {dtype, shape, data_offsets}} | the tensors' bytes in a row

Format: https://github.com/huggingface/safetensors. Its library reads these files, and this module reads the library's.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safecl.storage.durable import DamagedCheckpoint, open_regular

MAX_HEADER_BYTES = 100 * 10**6  # the limit of the library

ITEM_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file: its dtype by the name in safetensors, its shape, its first byte in the file, its size."""

    dtype: str
    shape: tuple[int, ...]
    position: int
    nbytes: int


def header_bytes(tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the first bytes of a file that holds the tensors {name: (dtype, shape)} in this order.

    Raises ValueError where the header becomes longer than readers accept.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, (dtype, shape) in tensors.items():
        end = begin + num_bytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(
            f"{len(entries):,} tensors need a header of {len(text):,} bytes, readers accept {MAX_HEADER_BYTES:,}"
        )
    return struct.pack("<Q", len(text)) + text


def num_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Size in bytes of a tensor, without a header."""
    return math.prod(shape) * ITEM_BYTES[dtype]


def read_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata of a file, without its data. Raises DamagedCheckpoint where header and file do not fit
    together."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise DamagedCheckpoint(f"{path}: not a safetensors file, its header would be {length:,} bytes of {size:,}")
        text = file.read(length)
    try:
        entries = json.loads(text)
        metadata = {str(key): str(value) for key, value in entries.pop("__metadata__", {}).items()}
        tensors = {name: _tensor(entry, 8 + length) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path}: its header cannot be read ({type(error).__name__}: {error})") from None
    _check_places(path, tensors, 8 + length, size)
    return tensors, metadata


def _tensor(entry: Mapping[str, Any], data: int) -> Tensor:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if entry["dtype"] not in ITEM_BYTES:
        raise ValueError(f"its dtype {entry['dtype']} is none of {', '.join(ITEM_BYTES)}")
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise ValueError("sizes must be whole numbers")
    if end - begin != num_bytes(entry["dtype"], shape):
        raise ValueError(f"{end - begin} bytes for {entry['dtype']} of shape {list(shape)}")
    return Tensor(entry["dtype"], shape, data + begin, end - begin)


def _check_places(path: Path, tensors: Mapping[str, Tensor], begin: int, size: int) -> None:
    for tensor in sorted(tensors.values(), key=lambda t: (t.position, t.nbytes)):
        if tensor.position != begin:
            raise DamagedCheckpoint(f"{path}: its tensors leave a gap or overlap at byte {begin:,}")
        begin += tensor.nbytes
    if begin != size:
        raise DamagedCheckpoint(f"{path}: {size:,} bytes long, its tensors end at byte {begin:,}")
