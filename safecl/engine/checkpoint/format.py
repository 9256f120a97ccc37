"""The format of a checkpoint: slices of state, and a manifest with a hash of every file. Imports no torch.

    step-00000500/
      rank-00000.safetensors    slices of weights and state that one rank wrote, and its random states
      memory.index              the replay memory's rows: their places and hashes, and the score log
      metrics.jsonl             one line per step so far
      state.json                counters, place in the sequence of tasks, evaluations, methods, config, versions
      manifest.json             size and XXH3-128 of every file above, shapes and dtypes; its first line hashes the rest

A kind of state that equals the model which the run began with (the anchor of a first task) is not stored: the manifest
has that model's name and hash instead. docs/reliability.md describes the format for other programs.

A slice is `length` elements of parameter `name` from flat offset `offset` on, of one kind (weights, exp_avg, ema, ...).
Its tensor in the safetensors file is called `kind|name|offset`. The slices of a kind tile each parameter without gap or
overlap, and padding is never stored, so that any layout can load any other by reading ranges.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

import xxhash
from pydantic import ConfigDict, TypeAdapter, ValidationError

from safecl.distributed import progress
from safecl.storage.durable import (
    DamagedCheckpoint,
    FileRecord,
    hash_file,
    open_regular,
    read_file,
    write_file,
)
from safecl.storage.safetensors_file import ITEM_BYTES, Tensor, header_bytes, read_header

FORMAT = "safecl-checkpoint"
VERSION = 2
READABLE = (1, 2)
"""Version 1 does not say whether the state is finite."""
MANIFEST = "manifest.json"
WEIGHTS = "weights"  # the kind of the weights themselves
RANDOM = "random"  # key of a rank's random states in the metadata of its file
MAX_MANIFEST_BYTES = 64 * 2**20

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class OtherFormat(DamagedCheckpoint):
    """A checkpoint of another version of the format. It cannot be loaded, but is not damaged and stays in its place."""


@dataclass(frozen=True, order=True)
class Slice:
    """`length` elements of `kind` of parameter `name` from flat offset `offset` on; `dtype` by its name in safetensors
    (F32, BF16)."""

    kind: str
    name: str
    offset: int
    length: int
    dtype: str

    @property
    def key(self) -> str:
        return f"{self.kind}|{self.name}|{self.offset}"

    @property
    def nbytes(self) -> int:
        return self.length * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class StoredSlice:
    """A slice and the byte of `file` at which it begins."""

    slice: Slice
    file: str
    position: int


@dataclass(frozen=True)
class Reference:
    """State that is not stored because it equals the run's base model.

    It has the model's name in the config, a hash of its weights in the run's dtype, and the dtype of the state.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    model: str
    digest: str
    dtype: str


@dataclass(frozen=True)
class Manifest:
    """The contents of a checkpoint.

    `parameters`: shapes by name. `kinds`: dtypes of the stored state by kind. `references`: kinds that equal a model.
    `finite`: no value of the state is NaN or infinite; version 1 does not say it.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    step: int
    world_size: int
    files: dict[str, FileRecord]
    parameters: dict[str, tuple[int, ...]]
    kinds: dict[str, str]
    references: dict[str, Reference] = field(default_factory=dict)
    finite: bool = False
    version: int = VERSION
    format: str = FORMAT

    @property
    def num_bytes(self) -> int:
        return sum(record.size for record in self.files.values())


_MANIFEST = TypeAdapter(Manifest)


@dataclass
class Contents:
    """A checkpoint whose manifest and headers fit together, and the places of its slices. `slices[kind, parameter]` is
    sorted by offset."""

    folder: Path
    manifest: Manifest
    slices: dict[tuple[str, str], list[StoredSlice]] = field(default_factory=dict)


# --------------------------------------------------------------------------------------------------------------- slices


def arrange(slices: Iterable[Slice]) -> list[tuple[Slice, int]]:
    """Order the slices of a file and give each its byte position in the data: wide dtypes come first, so that every
    slice is aligned."""
    placed, position = [], 0
    for one in sorted(slices, key=lambda s: (-ITEM_BYTES[s.dtype], s)):
        placed.append((one, position))
        position += one.nbytes
    return placed


def rank_file(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def write_slices(
    path: Path,
    placed: Iterable[tuple[Slice, int]],
    blocks: Iterable[bytes | memoryview],
    metadata: Mapping[str, str] | None = None,
) -> FileRecord:
    """Write slices, whose data `arrange` has placed and `blocks` hold in order, and return when they are on the disk.
    Raises OSError."""
    header = header_bytes({one.key: (one.dtype, [one.length]) for one, _ in placed}, metadata)
    return write_file(path, itertools.chain([header], _told(blocks)))


def _told(blocks: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """Yield the blocks, and tell the watchdog of each."""
    for block in blocks:
        progress.block_saved()
        yield block


def read_slices(path: Path) -> list[StoredSlice]:
    """Read the slices of a file, without their data. Raises DamagedCheckpoint where a tensor is not a slice."""
    tensors, _ = read_header(path)
    return [StoredSlice(_slice_of(path, key, tensor), path.name, tensor.position) for key, tensor in tensors.items()]


def _slice_of(path: Path, key: str, tensor: Tensor) -> Slice:
    kind, _, rest = key.partition("|")
    name, _, offset = rest.rpartition("|")
    if not (kind and name and re.fullmatch("[0-9]{1,18}", offset) and len(tensor.shape) == 1):
        raise DamagedCheckpoint(f"{path}: the tensor {key!r} is not a slice of a parameter")
    return Slice(kind, name, int(offset), tensor.shape[0], tensor.dtype)


def ranges(stored: Sequence[StoredSlice], offset: int, length: int) -> list[tuple[str, int, int, int]]:
    """Return the stored ranges that cover elements [offset, offset + length) of a parameter: (file, first byte, first
    element of the target, number of elements)."""
    found = []
    for one in stored:
        low, high = max(offset, one.slice.offset), min(offset + length, one.slice.offset + one.slice.length)
        if low < high:
            byte = one.position + (low - one.slice.offset) * ITEM_BYTES[one.slice.dtype]
            found.append((one.file, byte, low - offset, high - low))
    return found


# ------------------------------------------------------------------------------------------------------------- manifest


def dump_manifest(manifest: Manifest) -> bytes:
    """Write the manifest as text, after a line with the text's hash."""
    body = json.dumps(asdict(manifest), indent=1, sort_keys=True, allow_nan=False).encode()
    return xxhash.xxh3_128_hexdigest(body).encode() + b"\n" + body


def read_manifest(folder: Path) -> Manifest:
    """Read and check a checkpoint's manifest. Raises DamagedCheckpoint where it is missing or changed, OtherFormat for
    another version."""
    path = folder / MANIFEST
    digest, _, body = read_file(path, MAX_MANIFEST_BYTES).partition(b"\n")
    if digest != xxhash.xxh3_128_hexdigest(body).encode():
        raise DamagedCheckpoint(f"{path}: its hash does not match its text")
    manifest = _parse_manifest(path, body)
    if manifest.name != folder.name:
        raise DamagedCheckpoint(f"{path}: belongs to {manifest.name!r}, its folder is called {folder.name!r}")
    return manifest


def _parse_manifest(path: Path, body: bytes) -> Manifest:
    try:
        values = json.loads(body)
        if values["format"] != FORMAT or values["version"] not in READABLE:
            raise OtherFormat(
                f"{path}: {values['format']} version {values['version']}, this safecl reads {FORMAT} versions "
                f"{' and '.join(map(str, READABLE))}"
            )
        manifest = _MANIFEST.validate_python(values)
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(map(str, wrong["loc"]))
        raise DamagedCheckpoint(f"{path}: cannot be read ({place}: {wrong['msg']})") from None
    except DamagedCheckpoint:
        raise
    except (KeyError, TypeError, RecursionError, ValueError) as error:
        raise DamagedCheckpoint(f"{path}: cannot be read ({type(error).__name__}: {error})") from None
    for name in manifest.files:
        if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
            raise DamagedCheckpoint(f"{path}: names the file {name!r}, which no checkpoint has")
    if both := sorted(manifest.kinds.keys() & manifest.references.keys()):
        raise DamagedCheckpoint(f"{path}: says both that {both[0]} is stored and that it equals a model")
    return manifest


# --------------------------------------------------------------------------------------------------------- verification


def read_contents(folder: Path) -> Contents:
    """Read a checkpoint's manifest and headers, and check everything but the hashes. Raises DamagedCheckpoint.

    Checked are the sizes of files, and that the slices of each kind tile each parameter.
    """
    contents = Contents(folder, read_manifest(folder))
    check_sizes(folder, contents.manifest)
    for name in contents.manifest.files:
        if name.startswith("rank-"):
            for stored in read_slices(folder / name):
                contents.slices.setdefault((stored.slice.kind, stored.slice.name), []).append(stored)
    _check_tiling(contents)
    return contents


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Raise DamagedCheckpoint where a file is missing, a link, or has another size."""
    for name, record in manifest.files.items():
        with open_regular(folder / name) as file:
            size = file.seek(0, 2)
        if size != record.size:
            raise DamagedCheckpoint(f"{folder / name}: {size:,} bytes long, {record.size:,} were written")


def _check_tiling(contents: Contents) -> None:
    manifest = contents.manifest
    expected = {(kind, name) for kind in manifest.kinds for name in manifest.parameters}
    if unknown := sorted(set(contents.slices) - expected):
        raise DamagedCheckpoint(f"{contents.folder}: holds {' of '.join(unknown[0])}, which its manifest does not name")
    for kind, name in sorted(expected):
        stored = contents.slices.setdefault((kind, name), [])
        stored.sort(key=lambda s: (s.slice.offset, s.slice.length))
        end, numel = 0, math.prod(manifest.parameters[name])
        for one in stored:
            if one.slice.offset != end or one.slice.dtype != manifest.kinds[kind]:
                raise DamagedCheckpoint(
                    f"{contents.folder}: {kind} of {name}: gap, overlap or another dtype at element {end:,}"
                )
            end += one.slice.length
        if end != numel:
            raise DamagedCheckpoint(f"{contents.folder}: {kind} of {name} ends at element {end:,} of {numel:,}")


def check_hashes(folder: Path, manifest: Manifest, rank: int = 0, world_size: int = 1) -> None:
    """Compare the hashes of this rank's part of the files. Raises DamagedCheckpoint for the first that differs."""
    by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name].size, name))
    for name in by_size[rank::world_size]:
        if hash_file(folder / name) != manifest.files[name].xxh3_128:
            raise DamagedCheckpoint(f"{folder / name}: its bytes are not those that were written")
