"""ReferenceStore: the aligned model theta_0 in host memory, once per node, read by name and range from every rank.

    with ReferenceStore.open("path/of/model", dtype=torch.bfloat16) as store:
        store.tensor("model.embed_tokens.weight")        # whole, read-only, zero copy
        store.read("lm_head.weight", 1000, 2000, out)     # elements 1000 to 2000 of the flat tensor

One rank of each node fills a shared segment from the model's safetensors files, rounded once to the run's dtype; the
others map it. The student is made from it (safecl.engine.model.language_model), the anchor of weight penalties is read
from it, and a teacher streams its layers from it, so that all of them start from the same bytes. Where the segment does
not fit and there is no GPU, the files themselves are mapped.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from safecl.distributed import collectives
from safecl.distributed.node import Node, this_node
from safecl.engine.checkpoint.folder import format_bytes
from safecl.engine.reference import shared_memory
from safecl.engine.reference.layout import Layout, Where
from safecl.engine.reference.segment import Offer, new_segment, provide, tensor_view
from safecl.engine.reference.sources import Converter, Reader, Sources, find_weights
from safecl.storage.durable import DamagedCheckpoint, open_regular
from safecl.storage.model_folder import ModelFiles, Stamp, UnusableWeights

T = TypeVar("T")


@dataclass
class ReferenceStore:
    """All parameters of a model in host memory, shared by the node's ranks. Make one with `open`; reading is not a
    collective call."""

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

    # ---------------------------------------------------------------------------------------------------------- opening

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        model: torch.nn.Module | None = None,
        where: Where = "auto",
        node: Node | None = None,
        vocab_size: int | None = None,
        trust_remote_code: bool = False,
    ) -> ReferenceStore:
        """The store of a Hugging Face folder or hub id. A collective call of all ranks of the job; without a process
        group, of one process.

        Args: `dtype` of the store; `model`, the model's structure where it is known already (parameters may be on the
        meta device); `where`: `segment` of shared memory, the `file` itself mapped (its dtype must be `dtype`), or
        `auto`, the segment if it fits; `node`, ranks that share memory (asked for by default); `vocab_size`, how many
        tokens the model must know. Raises UnusableWeights (a ConfigError) on all ranks: tensors missing or of a wrong
        shape, another vocabulary, a truncated file, too little memory.
        """
        from safecl.engine.model.structure import empty_model

        node = node or this_node()
        model = model if model is not None else empty_model(str(path), dtype, trust_remote_code=trust_remote_code)
        layout = Layout.of(model, dtype)
        _check_vocabulary(layout, vocab_size, str(path))
        files, sources = _agree(lambda: find_weights(str(path), layout))
        reader = (
            Reader(layout, files, sources) if sources is not None else Converter(layout, str(path), trust_remote_code)
        )
        with contextlib.ExitStack() as stack:
            work = lambda: provide(layout, reader, where, stack)  # noqa: E731
            offer = next(
                said for said in node.exchange(_agree(work if node.is_first else lambda: None)) if said is not None
            )
            store = cls(layout, offer.digest, offer.where, files, offer.buffers, list(offer.notes))
            _agree(lambda: store._map(offer, reader, node, stack))
        store._compare_nodes(str(path))
        store._pin()
        return store

    def _map(self, offer: Offer, reader: Reader | Converter, node: Node, stack: contextlib.ExitStack) -> None:
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
            handle = os.dup(new_segment(self.layout, reader, stack)[0])
        self._maps = [shared_memory.map_segment(handle, self.layout.nbytes, writable)]
        os.close(handle)
        self._tensors = {
            name: tensor_view(self._maps[0], self.layout.offsets[name], shape, self.layout.dtype)
            for name, shape in self.layout.shapes.items()
        }

    def _map_files(self, sources: Sources) -> None:
        maps: dict[Path, mmap.mmap] = {}
        for name, (path, tensor) in sources.items():
            if path not in maps:
                with open_regular(path.resolve()) as file:
                    maps[path] = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
            self._tensors[name] = tensor_view(maps[path], tensor.position, tensor.shape, self.layout.dtype)
        self._maps = list(maps.values())

    def _compare_nodes(self, path: str) -> None:
        """All nodes must have read the same model: nothing is broadcast, and shards of two models would train
        silently."""
        digests = collectives.gather_objects([self.digest])
        if len(set(digests)) > 1:
            other = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
            raise UnusableWeights(
                f"model.path: {path} holds other weights on the node of rank {other} than on that of rank 0"
            )

    def _pin(self) -> None:
        if not torch.cuda.is_available() or self.where != "segment":
            return
        start = next(iter(self._tensors.values())).data_ptr()
        code = int(torch.cuda.cudart().cudaHostRegister(start, self.layout.nbytes, 0))
        self.pinned = code == 0
        if not self.pinned:
            self.notes.append(
                f"the reference weights cannot be registered with CUDA (error {code}); copies from them are slower"
            )

    # ---------------------------------------------------------------------------------------------------------- reading

    def names(self) -> list[str]:
        """Names of all parameters; of tied ones, all names."""
        return list(self.layout.aliases)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.layout.shapes[self.layout.aliases[name]]

    def tensor(self, name: str) -> torch.Tensor:
        """The parameter, on the CPU, without a copy. It must not be written to: the memory is read-only and belongs to
        all ranks.

        The tensor stays valid after `close`.
        """
        return self._tensors[self.layout.aliases[name]]

    def read(self, name: str, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        """Copies elements [start, stop) of the flat parameter into `out` (any device and dtype); asynchronous where the
        store is pinned."""
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
        """UnusableWeights naming the file where the model's files are no longer those that the store was filled
        from."""
        if self.files is not None:
            self.files.check_unchanged()

    # ---------------------------------------------------------------------------------------------------------- closing

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


# -------------------------------------------------------------------------------------------------- finding the weights


def _agree(work: Callable[[], T]) -> T:
    """What the work gives; where it fails on any rank, UnusableWeights with the first rank's reason on all of them."""
    value, problem = None, None
    try:
        value = work()
    except (UnusableWeights, DamagedCheckpoint, OSError) as error:
        problem = str(error)
    problems = [said for said in collectives.gather_objects([problem]) if said is not None]
    if problems:
        raise UnusableWeights(problems[0])
    return value


def _check_vocabulary(layout: Layout, wanted: int | None, path: str) -> None:
    found = layout.shapes[layout.embedding][0]
    if wanted is not None and found != wanted:
        raise UnusableWeights(f"{path}: a model with a vocabulary of {found:,} tokens where {wanted:,} are needed")


# ---------------------------------------------------------------------------------------------------- filling a segment


__all__ = ["Layout", "ReferenceStore", "Stamp", "UnusableWeights"]
