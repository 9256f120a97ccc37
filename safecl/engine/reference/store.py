"""ReferenceStore: the aligned model theta_0 in host memory, once per node, which every rank reads by name and range.

    with ReferenceStore.open("path/of/model", dtype=torch.bfloat16) as store:
        store.tensor("model.embed_tokens.weight")        # whole, read-only, zero copy
        store.read("lm_head.weight", 1000, 2000, out)     # elements 1000 to 2000 of the flat tensor

One rank of each node fills a shared segment from the model's safetensors files, rounded once to the run's dtype; the
others map it. The student is made from it (safecl.engine.reference.loading), the anchor of weight penalties is read
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
from typing import TYPE_CHECKING, TypeVar

import torch

from safecl.distributed import collectives, devices
from safecl.distributed.node import Node, this_node
from safecl.engine.reference import shared_memory
from safecl.engine.reference.layout import Layout, Where
from safecl.engine.reference.segment import Offer, new_segment, provide, tensor_view
from safecl.engine.reference.sources import Converter, Given, Reader, Sources, find_weights
from safecl.kernels import page_locked
from safecl.storage.durable import DamagedCheckpoint, open_regular
from safecl.storage.model_folder import ModelFiles, Stamp
from safecl.storage.sizes import format_bytes
from safecl.storage.untrusted import UnusableWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


@dataclass
class ReferenceStore:
    """All parameters of a model in host memory, shared by the node's ranks. `open` makes one; reading is not a
    collective call."""

    layout: Layout
    digest: str
    """XXH3-128 of names and values in the store's dtype; models with equal digests are the same."""
    where: str
    """`segment` of shared memory, or the mapped `file`s."""
    files: ModelFiles | None
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Buffers that the checkpoint holds, in its dtype."""
    notes: list[str] = field(default_factory=list)
    """Messages to the user about how the store was made."""
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
        model: PreTrainedModel | None = None,
        where: Where = "auto",
        node: Node | None = None,
        vocab_size: int | None = None,
        trust_remote_code: bool = False,
    ) -> ReferenceStore:
        """Open the store of a Hugging Face folder or hub id. A collective call of all ranks of the job.

        Args: `dtype` of the store; `model`, the model's structure where it is known already (parameters may be on the
        meta device); `where`: `segment` of shared memory, the `file` itself mapped (its dtype must be `dtype`), or
        `auto`, the segment if it fits; `node`, the ranks that share memory (found out by default); `vocab_size`, the
        number of tokens that the model must have. Raises UnusableWeights (a ConfigError) on all ranks: tensors missing
        or of a wrong shape, another vocabulary, a truncated file, too little memory.
        """
        from safecl.engine.model.structure import empty_model

        node = node or this_node()
        model = model if model is not None else empty_model(str(path), dtype, trust_remote_code=trust_remote_code)
        layout = Layout.of(model, dtype)
        _check_vocabulary(layout, vocab_size, str(path))
        reader = _on_every_rank(lambda: find_weights(str(path), layout, model, trust_remote_code))
        return cls._make(layout, reader, where, node, str(path))

    @classmethod
    def filled(
        cls,
        model: PreTrainedModel,
        fill: Callable[[str, torch.Tensor], None],
        *,
        dtype: torch.dtype = torch.bfloat16,
        node: Node | None = None,
    ) -> ReferenceStore:
        """Make a store whose values do not come from files. A collective call of all ranks of the job.

        model: its structure, with parameters on the meta device. fill(name, values): writes a parameter's values into a
        1-D tensor; called by several threads, on the first rank of each node.
        """
        path = type(model).__name__
        return cls._make(Layout.of(model, dtype), Given(fill, path), "segment", node or this_node(), path)

    @classmethod
    def _make(
        cls, layout: Layout, reader: Reader | Converter | Given, where: Where, node: Node, path: str
    ) -> ReferenceStore:
        with contextlib.ExitStack() as stack:
            own = _on_every_rank(lambda: provide(layout, reader, where, stack) if node.is_first else None)
            offer = next(offer for offer in node.exchange(own) if offer is not None)
            store = cls(layout, offer.digest, offer.where, reader.files, offer.buffers, list(offer.notes))
            _on_every_rank(lambda: store._map(offer, reader, node, stack))
        store._compare_nodes(path)
        store._pin()
        return store

    def _map(self, offer: Offer, reader: Reader | Converter | Given, node: Node, stack: contextlib.ExitStack) -> None:
        if offer.where == "file":
            assert isinstance(reader, Reader), "a checkpoint that must be converted cannot be mapped"
            self._map_files(reader.sources)
            return
        writable = devices.on_gpu()  # CUDA registers writable memory only
        try:
            handle = os.open(offer.address, os.O_RDWR if writable else os.O_RDONLY)
        except OSError as error:
            self.notes.append(
                f"rank {node.rank} cannot open the memory of rank {node.ranks[0]} ({error.strerror}) and keeps a copy "
                f"of its own, {format_bytes(self.layout.nbytes)}"
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
        """Raise UnusableWeights where the nodes have read different models. Nothing is broadcast, so no other check
        would notice."""
        digests = collectives.gather_objects([self.digest])
        if len(set(digests)) > 1:
            other = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
            raise UnusableWeights(
                f"model.path: {path} holds other weights on the node of rank {other} than on that of rank 0"
            )

    def _pin(self) -> None:
        if not devices.on_gpu() or self.where != "segment":
            return
        problem = page_locked.register(self._start, self.layout.nbytes)
        self.pinned = problem is None
        if problem is not None:
            self.notes.append(f"reference weights: {problem}")

    @property
    def _start(self) -> int:
        return next(iter(self._tensors.values())).data_ptr()

    # ---------------------------------------------------------------------------------------------------------- reading

    def names(self) -> list[str]:
        """Names of all parameters, with every name of a tied one."""
        return list(self.layout.aliases)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.layout.shapes[self.layout.aliases[name]]

    def tensor(self, name: str) -> torch.Tensor:
        """The parameter on the CPU, without a copy. Do not write to it: its memory is read-only and all ranks share it.

        The tensor stays valid after `close`.
        """
        return self._tensors[self.layout.aliases[name]]

    def read(self, name: str, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        """Copy elements [start, stop) of the flat parameter into `out` (any device and dtype) and return it;
        asynchronous where the store is pinned."""
        return out.view(-1).copy_(self.tensor(name).view(-1)[start:stop], non_blocking=self.pinned)

    def holds(self, tensor: torch.Tensor) -> bool:
        """True where the tensor's elements lie in the store itself."""
        return tensor.device.type == "cpu" and any(
            own.data_ptr() <= tensor.data_ptr() < own.data_ptr() + max(1, own.nbytes) for own in self._tensors.values()
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.layout.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the node's host memory that the store takes."""
        return self.layout.nbytes

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding."""
        return self.layout.shapes[self.layout.embedding][0]

    def check_unchanged(self) -> None:
        """Raise UnusableWeights with the name of the first file that has changed since the store was filled."""
        if self.files is not None:
            self.files.check_unchanged()

    # ---------------------------------------------------------------------------------------------------------- closing

    def close(self) -> None:
        """Give the memory back as soon as no tensor of the store is in use any more."""
        if self.pinned:
            page_locked.unregister(self._start)
            self.pinned = False
        self._tensors, self._maps = {}, []

    def __enter__(self) -> ReferenceStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _on_every_rank(work: Callable[[], T]) -> T:
    """Do the work on every rank; where it fails on any, raise UnusableWeights on all."""
    return collectives.on_every_rank(work, (UnusableWeights, DamagedCheckpoint, OSError), UnusableWeights)


def _check_vocabulary(layout: Layout, wanted: int | None, path: str) -> None:
    found = layout.shapes[layout.embedding][0]
    if wanted is not None and found != wanted:
        raise UnusableWeights(f"{path}: a model with a vocabulary of {found:,} tokens where {wanted:,} are needed")


__all__ = ["Layout", "ReferenceStore", "Stamp", "UnusableWeights"]
