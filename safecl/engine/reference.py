"""ReferenceStore: the aligned model theta_0 in host memory, once per node, read by name and range from every rank.

    with ReferenceStore.open("path/of/model", dtype=torch.bfloat16) as store:
        store.tensor("model.embed_tokens.weight")        # whole, read-only, zero copy
        store.read("lm_head.weight", 1000, 2000, out)     # elements 1000 to 2000 of the flat tensor

One rank of each node fills a shared segment from the model's safetensors files, rounded once to the run's dtype; the others map it. The
student is made from it (safecl.engine.model), the anchor of weight penalties is read from it, and a teacher streams its layers from it, so
that all of them start from the same bytes. Where the segment does not fit and there is no GPU, the files themselves are mapped.
"""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import os
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import xxhash

from safecl.engine import distributed, shared_memory
from safecl.engine.checkpoint_folder import format_bytes
from safecl.engine.durable import DamagedCheckpoint, open_regular, read_into
from safecl.engine.model_files import ModelFiles, Stamp, UnusableWeights, read_model_files
from safecl.engine.node import Node, this_node
from safecl.engine.tensor_file import Tensor

Where = Literal["auto", "segment", "file"]
T = TypeVar("T")

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BUFFER_DTYPES = DTYPES | {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_ALIGNMENT = 256  # of each tensor in the segment: what GPU copies and vector units like
_CHUNK_BYTES = 16 * 2**20
_FILLERS = 4


@dataclass(frozen=True)
class Layout:
    """Where each parameter of a model lies in the segment; a function of the model alone, so every rank works it out by itself."""

    dtype: torch.dtype
    shapes: Mapping[str, tuple[int, ...]]
    """Of each parameter, tied ones once, in the model's order."""
    offsets: Mapping[str, int]
    """First byte of each parameter."""
    nbytes: int
    aliases: Mapping[str, str]
    """Every name, that of a tied parameter too, to the name that it is kept under."""
    buffers: tuple[str, ...]
    """Names of buffers that belong to a checkpoint; few and small, so they are not in the segment."""
    embedding: str
    """Name of the input embedding, whose rows are the vocabulary."""
    prefix: str
    """Of names that a checkpoint of the headless model leaves out."""

    @classmethod
    def of(cls, model: torch.nn.Module, dtype: torch.dtype) -> Layout:
        names = {id(p): name for name, p in model.named_parameters()}
        aliases = {name: names[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        offsets, end = {}, 0
        for name, shape in shapes.items():
            offsets[name] = end
            end += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        embedding = names[id(model.get_input_embeddings().weight)]
        buffers = tuple(sorted(set(dict(model.named_buffers())) & set(model.state_dict())))
        return cls(dtype, shapes, offsets, max(end, 1), aliases, buffers, embedding, getattr(model, "base_model_prefix", ""))

    def num_bytes(self, name: str) -> int:
        return math.prod(self.shapes[name]) * self.dtype.itemsize


Sources = Mapping[str, tuple[Path, Tensor]]
"""Parameter name -> file and place in it."""


@dataclass(frozen=True)
class _Offer:
    """What the first rank of a node says to the others."""

    where: str
    address: str = ""
    digest: str = ""
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass
class ReferenceStore:
    """All parameters of a model in host memory, shared by the node's ranks. Make one with `open`; reading is not a collective call."""

    layout: Layout
    digest: str
    """XXH3-128 of names and values in the store's dtype: equal digests are the same model."""
    where: str
    """segment or file."""
    files: ModelFiles | None
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Buffers that the checkpoint holds, in its dtype."""
    notes: list[str] = field(default_factory=list)
    """What a user should know of how the store came about."""
    pinned: bool = False
    """Registered with CUDA, so that copies to the GPU are asynchronous and fast."""
    _tensors: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    _maps: list[mmap.mmap] = field(default_factory=list, repr=False)

    # ------------------------------------------------------------------------------------------------------------ opening

    @classmethod
    def open(
        cls, path: str | Path, *, dtype: torch.dtype = torch.bfloat16, model: torch.nn.Module | None = None, where: Where = "auto",
        node: Node | None = None, vocab_size: int | None = None, trust_remote_code: bool = False,
    ) -> ReferenceStore:  # fmt: skip
        """The store of a Hugging Face folder or hub id. A collective call of all ranks of the job; without a process group, of one process.

        Args: `dtype` of the store; `model`, the model's structure where it is known already (parameters may be on the meta device);
        `where`: `segment` of shared memory, the `file` itself mapped (its dtype must be `dtype`), or `auto`, the segment if it fits;
        `node`, ranks that share memory (asked for by default); `vocab_size`, how many tokens the model must know.
        Raises UnusableWeights (a ConfigError) on all ranks: tensors missing or of a wrong shape, another vocabulary, a truncated file, too
        little memory.
        """
        from safecl.engine.loading import empty_model

        node = node or this_node()
        model = model if model is not None else empty_model(str(path), dtype, trust_remote_code=trust_remote_code)
        layout = Layout.of(model, dtype)
        _check_vocabulary(layout, vocab_size, str(path))
        files, sources = _agree(lambda: _find(str(path), layout))
        reader = _Reader(layout, files, sources) if sources is not None else _Converter(layout, str(path), trust_remote_code)
        with contextlib.ExitStack() as stack:
            work = lambda: _provide(layout, reader, where, stack)  # noqa: E731
            offer = next(said for said in node.exchange(_agree(work if node.is_first else lambda: None)) if said is not None)
            store = cls(layout, offer.digest, offer.where, files, offer.buffers, list(offer.notes))
            _agree(lambda: store._map(offer, reader, node, stack))
        store._compare_nodes(str(path))
        store._pin()
        return store

    def _map(self, offer: _Offer, reader: _Reader | _Converter, node: Node, stack: contextlib.ExitStack) -> None:
        if offer.where == "file":
            self._map_files(reader.sources)
            return
        writable = torch.cuda.is_available()  # CUDA registers writable memory only
        try:
            handle = os.open(offer.address, os.O_RDWR if writable else os.O_RDONLY)
        except OSError as error:
            self.notes.append(
                f"rank {node.rank} cannot open the memory of rank {node.ranks[0]} ({error.strerror}) and keeps a copy of its own, "
                f"{format_bytes(self.layout.nbytes)}"
            )
            handle = os.dup(_new_segment(self.layout, reader, stack)[0])
        self._maps = [shared_memory.map_segment(handle, self.layout.nbytes, writable)]
        os.close(handle)
        self._tensors = {
            name: _view(self._maps[0], self.layout.offsets[name], shape, self.layout.dtype) for name, shape in self.layout.shapes.items()
        }

    def _map_files(self, sources: Sources) -> None:
        maps: dict[Path, mmap.mmap] = {}
        for name, (path, tensor) in sources.items():
            if path not in maps:
                with open_regular(path.resolve()) as file:
                    maps[path] = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
            self._tensors[name] = _view(maps[path], tensor.position, tensor.shape, self.layout.dtype)
        self._maps = list(maps.values())

    def _compare_nodes(self, path: str) -> None:
        """All nodes must have read the same model: nothing is broadcast, and shards of two models would train silently."""
        digests = distributed.gather_objects([self.digest])
        if len(set(digests)) > 1:
            other = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
            raise UnusableWeights(f"model.path: {path} holds other weights on the node of rank {other} than on that of rank 0")

    def _pin(self) -> None:
        if not torch.cuda.is_available() or self.where != "segment":
            return
        start = next(iter(self._tensors.values())).data_ptr()
        code = int(torch.cuda.cudart().cudaHostRegister(start, self.layout.nbytes, 0))
        self.pinned = code == 0
        if not self.pinned:
            self.notes.append(f"the reference weights cannot be registered with CUDA (error {code}); copies from them are slower")

    # ------------------------------------------------------------------------------------------------------------ reading

    def names(self) -> list[str]:
        """Names of all parameters; of tied ones, all names."""
        return list(self.layout.aliases)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.layout.shapes[self.layout.aliases[name]]

    def tensor(self, name: str) -> torch.Tensor:
        """The parameter, on the CPU, without a copy. It must not be written to: the memory is read-only and belongs to all ranks.

        The tensor stays valid after `close`.
        """
        return self._tensors[self.layout.aliases[name]]

    def read(self, name: str, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        """Copies elements [start, stop) of the flat parameter into `out` (any device and dtype); asynchronous where the store is pinned."""
        return out.view(-1).copy_(self.tensor(name).view(-1)[start:stop], non_blocking=self.pinned)

    def holds(self, tensor: torch.Tensor) -> bool:
        """True where the tensor's elements are those in the store itself."""
        return tensor.device.type == "cpu" and any(
            own.data_ptr() <= tensor.data_ptr() < own.data_ptr() + max(1, own.nbytes) for own in self._tensors.values()
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.layout.dtype

    @property
    def nbytes(self) -> int:
        """Host memory of the node that the store takes."""
        return self.layout.nbytes

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding."""
        return self.layout.shapes[self.layout.embedding][0]

    def check_unchanged(self) -> None:
        """UnusableWeights naming the file where the model's files are no longer those that the store was filled from."""
        if self.files is not None:
            self.files.check_unchanged()

    # ------------------------------------------------------------------------------------------------------------ closing

    def close(self) -> None:
        """Gives the memory back once no tensor of the store is in use any more."""
        if self.pinned:
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaHostUnregister(next(iter(self._tensors.values())).data_ptr())
            self.pinned = False
        self._tensors, self._maps = {}, []

    def __enter__(self) -> ReferenceStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ------------------------------------------------------------------------------------------------------- finding the weights


def _agree(work: Callable[[], T]) -> T:
    """What the work gives; where it fails on any rank, UnusableWeights with the first rank's reason on all of them."""
    value, problem = None, None
    try:
        value = work()
    except (UnusableWeights, DamagedCheckpoint, OSError) as error:
        problem = str(error)
    problems = [said for said in distributed.gather_objects([problem]) if said is not None]
    if problems:
        raise UnusableWeights(problems[0])
    return value


def _find(path: str, layout: Layout) -> tuple[ModelFiles | None, Sources | None]:
    """The model's files and where each parameter lies in them; no sources where only transformers knows how to read them."""
    files = read_model_files(path)
    if files is None:
        return None, None
    found = {name: _source(name, layout, files) for name in layout.shapes}
    missing = [name for name, source in found.items() if source is None]
    if missing and any(source not in found.values() for name, source in files.tensors.items() if name not in layout.buffers):
        return files, None  # perhaps under another name (GPT-NeoX): transformers converts it, or the converter says what is missing
    if missing:
        raise UnusableWeights(f"model.path: {path}: tensor {missing[0]} is missing" + _and_more(missing))
    for name, (file, tensor) in found.items():
        _check_tensor(name, layout, file, tensor)
    return files, found


def _source(name: str, layout: Layout, files: ModelFiles) -> tuple[Path, Tensor] | None:
    names = [name, *(alias for alias, kept in layout.aliases.items() if kept == name and alias != name)]
    bare = [each.removeprefix(f"{layout.prefix}.") for each in names if layout.prefix]
    return next((files.tensors[each] for each in [*names, *bare] if each in files.tensors), None)


def _check_tensor(name: str, layout: Layout, file: Path, tensor: Tensor) -> None:
    wanted = layout.shapes[name]
    if tensor.shape != wanted:
        if name == layout.embedding and tensor.shape[1:] == wanted[1:]:
            raise UnusableWeights(f"{file}: a vocabulary of {tensor.shape[0]:,} tokens, but the model's config.json says {wanted[0]:,}")
        raise UnusableWeights(f"{file}: {name} has shape {list(tensor.shape)}, the model's config.json says {list(wanted)}")
    if tensor.dtype not in DTYPES:
        raise UnusableWeights(f"{file}: {name} is stored as {tensor.dtype}; safecl reads {', '.join(DTYPES)}")


def _check_vocabulary(layout: Layout, wanted: int | None, path: str) -> None:
    found = layout.shapes[layout.embedding][0]
    if wanted is not None and found != wanted:
        raise UnusableWeights(f"{path}: a model with a vocabulary of {found:,} tokens where {wanted:,} are needed")


def _and_more(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""


# --------------------------------------------------------------------------------------------------------- filling a segment


def _provide(layout: Layout, reader: _Reader | _Converter, where: Where, stack: contextlib.ExitStack) -> _Offer:
    """On the first rank of a node: makes and fills the segment, or says that the files are to be mapped."""
    obstacle = reader.obstacle_to_mapping()
    if where == "file":
        if obstacle is not None:
            raise UnusableWeights(f"the model's files cannot be mapped: {obstacle}")
        return _Offer("file", "", reader.digest(), reader.buffers())
    try:
        handle, digest = _new_segment(layout, reader, stack)
    except shared_memory.NoRoom as error:
        if where == "segment" or obstacle is not None:
            raise UnusableWeights(f"{error}; the model's files cannot be mapped instead: {obstacle or 'where=segment'}") from None
        return _Offer("file", "", reader.digest(), reader.buffers(), (f"{error}: the model's files are mapped instead",))
    return _Offer("segment", shared_memory.address(handle), digest, reader.buffers())


def _new_segment(layout: Layout, reader: _Reader | _Converter, stack: contextlib.ExitStack) -> tuple[int, str]:
    """(handle, digest) of a segment that holds all parameters and that nobody can change; the handle is open as long as the stack."""
    handle = shared_memory.create(layout.nbytes, "safecl-reference")
    stack.callback(os.close, handle)
    memory = shared_memory.map_segment(handle, layout.nbytes, writable=True)
    view = memoryview(memory)

    load = reader.loader()

    def fill(name: str) -> bytes:
        target = view[layout.offsets[name] : layout.offsets[name] + layout.num_bytes(name)]
        load(name, torch.frombuffer(target, dtype=layout.dtype) if target else torch.empty(0, dtype=layout.dtype))
        return xxhash.xxh3_128(target).digest()

    with ThreadPoolExecutor(min(_FILLERS, os.cpu_count() or 1)) as pool:
        hashes = dict(zip(layout.shapes, pool.map(fill, layout.shapes), strict=True))
    reader.check_unchanged()
    view.release()
    memory.close()
    if not torch.cuda.is_available():
        shared_memory.seal(handle)
    return handle, _combine(layout, hashes)


@dataclass(frozen=True)
class _Reader:
    """Parameters straight from the model's files."""

    layout: Layout
    files: ModelFiles
    sources: Sources

    def loader(self) -> Callable[[str, torch.Tensor], Any]:
        """Fills a flat tensor with a parameter; safe to call from several threads."""
        return lambda name, target: _load(self.sources[name], target)

    def buffers(self) -> dict[str, torch.Tensor]:
        found = {name: self.files.tensors[name] for name in self.layout.buffers if name in self.files.tensors}
        values = {name: torch.empty(source[1].shape, dtype=_BUFFER_DTYPES[source[1].dtype]) for name, source in found.items()}
        for name, source in found.items():
            _load(source, values[name].view(-1))
        return values

    def check_unchanged(self) -> None:
        self.files.check_unchanged()

    def obstacle_to_mapping(self) -> str | None:
        """Why the files cannot stand for the segment; None where they can."""
        if torch.cuda.is_available():
            return "a GPU needs pinned memory"
        for name, (file, tensor) in self.sources.items():
            if DTYPES[tensor.dtype] != self.layout.dtype:
                return f"{file} holds {name} as {tensor.dtype}, the run needs {_NAMES[self.layout.dtype]}"
            if tensor.position % self.layout.dtype.itemsize:
                return f"{file} is not aligned"
        return None

    def digest(self) -> str:
        """That of a segment with the same values, where the files are mapped."""
        hashes = {}
        for name, (path, tensor) in self.sources.items():
            digest, block = xxhash.xxh3_128(), bytearray(_CHUNK_BYTES)
            with open_regular(path.resolve()) as file:
                for start in range(0, tensor.nbytes, _CHUNK_BYTES):
                    part = memoryview(block)[: min(_CHUNK_BYTES, tensor.nbytes - start)]
                    read_into(file, tensor.position + start, part)
                    digest.update(part)
            hashes[name] = digest.digest()
        return _combine(self.layout, hashes)


@torch.no_grad()
def _load(source: tuple[Path, Tensor], target: torch.Tensor) -> None:
    """Reads one tensor in chunks, rounding each to the target's dtype."""
    path, tensor = source
    stored = _BUFFER_DTYPES[tensor.dtype]
    chunk = _CHUNK_BYTES // stored.itemsize
    scratch = None if stored == target.dtype else torch.empty(min(chunk, target.numel()), dtype=stored)
    with open_regular(path.resolve()) as file:
        for start in range(0, target.numel(), chunk):
            part = target[start : start + chunk]
            read = part if scratch is None else scratch[: part.numel()]
            read_into(file, tensor.position + start * stored.itemsize, memoryview(read.view(torch.uint8).numpy()))
            if scratch is not None:
                part.copy_(read)


@dataclass(frozen=True)
class _Converter:
    """Parameters of a checkpoint whose names or tensors transformers converts while it loads: it does, once per node."""

    layout: Layout
    path: str
    trust_remote_code: bool
    sources = None

    @functools.cached_property
    def _state(self) -> dict[str, torch.Tensor]:
        from transformers import AutoModelForCausalLM

        try:
            model, said = AutoModelForCausalLM.from_pretrained(
                self.path, dtype=self.layout.dtype, trust_remote_code=self.trust_remote_code, output_loading_info=True
            )
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            raise UnusableWeights(f"model.path: {self.path}: cannot be loaded: {str(error).strip().splitlines()[0][:300]}") from None
        if missing := sorted(said["missing_keys"]):
            raise UnusableWeights(f"model.path: {self.path}: tensor {missing[0]} is missing" + _and_more(missing))
        return model.state_dict()

    def loader(self) -> Callable[[str, torch.Tensor], Any]:
        state = self._state
        return lambda name, target: target.copy_(state[name].view(-1))

    def buffers(self) -> dict[str, torch.Tensor]:
        return {name: self._state[name] for name in self.layout.buffers}

    def check_unchanged(self) -> None:
        """What transformers has read is in memory."""

    def obstacle_to_mapping(self) -> str | None:
        return "their tensors must be converted"


def _combine(layout: Layout, hashes: Mapping[str, bytes]) -> str:
    digest = xxhash.xxh3_128(str(layout.dtype).encode())
    for name in sorted(hashes):
        digest.update(name.encode() + hashes[name])
    return digest.hexdigest()


def _view(memory: mmap.mmap, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)


__all__ = ["Layout", "ReferenceStore", "Stamp", "UnusableWeights"]
