"""`merge`: model folders in, a model folder out."""

from __future__ import annotations

import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from safecl.config import ConfigError
from safecl.distributed.progress import counted
from safecl.engine.checkpoint.format import MANIFEST
from safecl.engine.model.dtypes import FLOAT_DTYPES
from safecl.merging.base import Merge, MergeConfig
from safecl.merging.models.folder import FolderWeights
from safecl.merging.models.lora import AdapterWeights
from safecl.merging.models.matching import copied
from safecl.merging.models.opening import Opened, open_models
from safecl.merging.models.tensor_files import ReusedMemory
from safecl.merging.output.adapter import write_adapter
from safecl.merging.output.beside import copy_beside, copy_tokenizer
from safecl.merging.output.new_folder import NewFolder
from safecl.merging.output.weights import Entry, Written, write_weights
from safecl.merging.registry import kind_module, kinds, read_settings
from safecl.merging.report import MergeReport, ParentRecord, card_text
from safecl.merging.stream import Piece, Read, ReadAhead, merged_rows, merged_tensor, pieces_of, run_passes
from safecl.storage.durable import write_file

_OF_A_MODEL = ("config.json", "adapter_config.json", MANIFEST)
_DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
_TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}

Progress = Callable[[int, int], None]
"""Called with the elements that are done, and with all."""


def merge(
    kind: str,
    *,
    out: str | Path,
    base: str | Path | None = None,
    tuned: Sequence[str | Path] | str | Path = (),
    aligned: str | Path | None = None,
    data: str | Path | None = None,
    progress: Progress | None = None,
    files: Mapping[str, bytes] = MappingProxyType({}),
    measured: str | None = None,
    **settings: Any,
) -> MergeReport:
    """Merge models, folders in and a folder out, tensor by tensor in fp32.

    kind: the name of a merge; `safecl.merging.kinds()` lists them. base, tuned, aligned: folders or hub ids of whole
    models, or folders of LoRA adapters, which count as dense weights. The result has the names, dtypes, settings,
    tokenizer and chat template of the first tuned model. data: a file of rows, for the kinds that need one. settings:
    those of the kind, and of MergeConfig. progress: called with the numbers of elements done and in all. files: further
    files of the folder, by name. measured: the card's paragraph on what was measured; nothing, by default.

    Memory: two of the largest tensors per model in fp32, of which merges by rows take a small part; a merge that runs
    rows through a model says what it needs. Raises ConfigError, with nothing written, where models or settings do not
    fit; OSError where the disk fails. The folder appears when everything in it is on the disk.
    """
    begin = time.monotonic()
    config = read_settings(kind, settings)
    paths = [tuned] if isinstance(tuned, (str, Path)) else list(tuned)
    folder = NewFolder(Path(out).expanduser())
    check_parents(folder, [*paths, base, aligned])
    folder.check_free()
    opened = open_models(
        kind,
        config,
        base=text_path(base),
        tuned=[os.fspath(path) for path in paths],
        aligned=text_path(aligned),
        data=Path(data).expanduser() if data is not None else None,
    )
    try:
        return _Work(kind, config, opened, folder, progress, begin, files, measured).run()
    finally:
        opened.close()


def text_path(path: str | Path | None) -> str | None:
    """Return a path as text."""
    return None if path is None else os.fspath(path)


def check_parents(folder: NewFolder, parents: Sequence[str | Path | None]) -> None:
    """Raise ConfigError where the new folder lies in that of a model that is merged."""
    for parent in parents:
        if parent is None or not any((Path(parent).expanduser() / name).is_file() for name in _OF_A_MODEL):
            continue  # is named as no model when it is opened
        place = Path(parent).expanduser().resolve()
        if folder.path.resolve() == place or place in folder.path.resolve().parents:
            raise ConfigError(f"{folder.path}: lies in the folder of a model that is merged; choose another place")


def entries_of(config: MergeConfig, opened: Opened) -> dict[str, Entry]:
    """Return the tensors of the result."""
    home = opened.matched.views[0]
    entries = {}
    for name, shape in home.shapes.items():
        stored = home.source.stored[home.names[name]].dtype
        asked = _DTYPES.get(config.dtype, stored) if stored in FLOAT_DTYPES else stored
        entries[name] = Entry(asked, shape)
    return entries


@dataclass
class _Work:
    """One merge, when its models are open."""

    kind: str
    config: MergeConfig
    opened: Opened
    folder: NewFolder
    progress: Progress | None
    begin: float
    files: Mapping[str, bytes]
    measured: str | None
    done: int = 0
    _count: Callable[[int], None] = lambda elements: None

    @functools.cached_property
    def merge(self) -> Merge[MergeConfig]:
        made: Merge[MergeConfig] = kind_module(self.kind).Merge(self.config, self.opened.models)
        return made

    @functools.cached_property
    def _memory(self) -> ReusedMemory:
        return ReusedMemory()

    def run(self) -> MergeReport:
        entries = entries_of(self.config, self.opened)
        try:
            partial = self.folder.begin(sum(entry.nbytes for entry in entries.values()))
            with counted("values", self._total) as self._count:
                report = self._combine(partial, entries)
            card = card_text(self.kind, kinds().get(self.kind, ""), self.folder.path.name, report, self.measured)
            for name, content in {"README.md": card.encode(), **self.files}.items():
                write_file(partial / name, [content])
            self.opened.check_unchanged()
            self.folder.publish()
            return report
        finally:
            self.folder.abandon()

    # ------------------------------------------------------------------------------------------------- reading, writing

    def _combine(self, partial: Path, entries: Mapping[str, Entry]) -> MergeReport:
        with self._reading(self.merge.num_passes) as read:
            run_passes(self.merge, self.opened.models, self._advance, read)
        if self.config.adapter_rank is None:
            return self._write_model(partial, entries)
        return self._write_adapter(partial, self.config.adapter_rank)

    @contextmanager
    def _reading(self, num_passes: int = 1) -> Iterator[Read | None]:
        """Yield a reader of all tensors' pieces, in their order, as often as told; None for merges that read
        themselves."""
        merge, models = self.merge, self.opened.models
        if num_passes == 0 or not (merge.by_rows or merge.reads_ahead):
            yield None
            return
        names = list(models.places) * num_passes
        following = dict(itertools.pairwise(names))

        def begin(piece: Piece) -> None:
            self._memory.turn()
            self.opened.reuse(self._memory)
            if piece.start == 0 and piece.name in following:
                for view in self.opened.matched.views:
                    view.read_ahead(following[piece.name])

        reader = ReadAhead(models, (piece for name in names for piece in pieces_of(merge, models, name)), begin)
        try:
            yield reader
        finally:
            reader.close()
            self.opened.reuse(None)

    def _write_model(self, partial: Path, entries: Mapping[str, Entry]) -> MergeReport:
        source = self.opened.home.source
        with self._reading() as read:
            values = functools.partial(self._values, read)
            written = write_weights(partial, entries, values, self.config.max_file_bytes)
        folder = source.folder if isinstance(source, FolderWeights) else source.base.folder
        tokenizer = source.folder if isinstance(source, AdapterWeights) else None
        copy_beside(folder, partial, changes=self._changes(entries), tokenizer=tokenizer)
        return self._report(len(entries), written)

    def _values(self, read: Read | None, name: str) -> Iterator[torch.Tensor | bytes]:
        if name not in self.opened.models.places:
            yield copied(self.opened.matched.views, name)
            return
        for rows in merged_rows(self.merge, self.opened.models, name, read):
            self._advance(rows.numel())
            yield rows

    def _changes(self, entries: Mapping[str, Entry]) -> dict[str, Any]:
        """The keys of config.json that differ from the first tuned model's."""
        changes: dict[str, Any] = {}
        if self.opened.matched.unties:
            changes["tie_word_embeddings"] = False
        if self.config.dtype != "same":
            key = "torch_dtype" if "torch_dtype" in self.opened.home.source.settings else "dtype"
            changes[key] = _TORCH_NAMES[_DTYPES[self.config.dtype]]
        return changes

    def _write_adapter(self, partial: Path, rank: int) -> MergeReport:
        source = self.opened.home.source
        base = self.opened.trained_on(source) if isinstance(source, AdapterWeights) else None
        if base is None or not isinstance(source, AdapterWeights):
            raise ConfigError(f"{self.kind}: adapter_rank needs a --base, and an adapter as the first --tuned")
        read = functools.partial(merged_tensor, self.merge, self.opened.models)
        path = str(source.adapter_settings["base_model_name_or_path"])
        local = source.base.folder
        written = write_adapter(
            partial,
            base,
            os.fspath(local.resolve()) if Path(path).expanduser().exists() or not path.count("/") == 1 else path,
            read,
            rank,
            FLOAT_DTYPES[_DTYPES.get(self.config.dtype, source.factor_dtype)],
            self._advance,
        )
        copy_tokenizer(source.folder, partial)
        note = f"an adapter of rank {rank} that leaves out {written.left_out:.2%} of the change (Frobenius norm)"
        return self._report(written.num_tensors, Written(1, written.num_bytes), note)

    # ---------------------------------------------------------------------------------------------------------- report

    def _report(self, num_tensors: int, written: Written, *notes: str) -> MergeReport:
        return MergeReport(
            kind=self.kind,
            out=os.fspath(self.folder.path),
            settings=self.config.model_dump(mode="json"),
            parents=[ParentRecord(p.role, p.path, p.source.digest()) for p in self._in_order()],
            num_tensors=num_tensors,
            num_files=written.num_files,
            num_bytes=written.num_bytes,
            seconds=time.monotonic() - self.begin,
            notes=[*self.opened.matched.notes, *self.merge.notes(), *notes],
        )

    def _in_order(self) -> list[Any]:
        return sorted(self.opened.parents, key=lambda parent: parent.role != "base")

    @functools.cached_property
    def _total(self) -> int:
        passes = self.merge.num_passes + 1
        shapes = self.opened.models.tuned[0].shapes
        return passes * sum(math.prod(shapes[name]) for name in self.opened.models.places)

    def _advance(self, elements: int) -> None:
        self.done += elements
        self._count(elements)
        if self.progress is not None:
            self.progress(self.done, self._total)
