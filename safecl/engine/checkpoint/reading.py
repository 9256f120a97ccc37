"""Loads a run's sharded state into any world size, ZeRO stage and offload.

All ranks agree that a checkpoint is whole before anything is changed; where it is not, they take an older one. Then a
rank reads the byte ranges that its own shards need: straight into shards in host memory, and through a buffer of 16 MiB
into shards on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch

from safecl.config import ConfigError
from safecl.distributed import collectives
from safecl.engine.checkpoint.format import (
    RANDOM,
    WEIGHTS,
    Contents,
    OtherFormat,
    Reference,
    check_hashes,
    ranges,
    rank_file,
    read_contents,
)
from safecl.engine.checkpoint.publishing import CheckpointFolder
from safecl.engine.checkpoint.random_state import set_random_state
from safecl.engine.checkpoint.report import BaseModel
from safecl.engine.model.dtypes import DTYPES, tensor_bytes
from safecl.engine.zero.optimizer import ShardAdamW
from safecl.engine.zero.shards import Fragment, ShardMap
from safecl.storage.durable import BLOCK_BYTES, DamagedCheckpoint, open_regular, read_into
from safecl.storage.safetensors_file import read_header


class CheckpointReader:
    """Loads weights and optimizer state of one engine. `find` and `load` are collective calls.

        contents = reader.find(note=print)                         # the newest whole checkpoint, or None
        reader.load(contents)

    `base` is the model that the run began with, where state may equal its weights (see CheckpointWriter).
    """

    def __init__(
        self, shards: ShardMap, optimizer: ShardAdamW, folder: CheckpointFolder, base: BaseModel | None = None
    ):
        self.shards, self.optimizer, self.folder, self.base = shards, optimizer, folder, base
        self._has_loaded = False

    # ---------------------------------------------------------------------------------------------------------- finding

    def find(self, note: Callable[[str], None], checks: Sequence[Callable[[Contents], None]] = ()) -> Contents | None:
        """Find the newest checkpoint that is whole for all ranks; None where there is no checkpoint at all.

        Damaged newer ones are set aside, with a message to `note`. `checks` are further conditions, which raise
        DamagedCheckpoint; all ranks pass one check before any rank begins the next. Raises ConfigError where there are
        checkpoints and none is whole, or the newest has another version of the format.
        """
        problems: dict[str, str] = {}
        for name in collectives.gather_objects([self.folder.names()])[0]:
            try:
                contents = self._examine(self.folder.path / name, checks)
            except DamagedCheckpoint as error:
                problems[name] = str(error)
                continue
            self._set_aside(problems, name, note)
            return contents
        if problems:
            raise ConfigError(
                f"{self.folder.path}: no checkpoint is whole, so the run cannot resume:\n"
                + "\n".join(f"  {name}: {problem}" for name, problem in problems.items())
                + "\nRestore one from a backup, or move the run folder away to start anew."
            )
        return None

    def _examine(self, folder: Path, checks: Sequence[Callable[[Contents], None]]) -> Contents:
        """Read and check a checkpoint. Raises DamagedCheckpoint on all ranks where one of them finds it damaged."""
        errors = (DamagedCheckpoint, OSError)
        contents = collectives.on_every_rank(lambda: self._read_contents(folder), errors, DamagedCheckpoint)
        for check in checks:
            collectives.on_every_rank(partial(check, contents), errors, DamagedCheckpoint)
        return contents

    def _read_contents(self, folder: Path) -> Contents:
        try:
            contents = read_contents(folder)
        except OtherFormat as error:
            raise ConfigError(
                f"{error}; resume with the safecl that wrote it, or start a new run with another `output`"
            ) from None
        check_hashes(folder, contents.manifest, collectives.rank(), collectives.world_size())
        return contents

    def _set_aside(self, problems: Mapping[str, str], chosen: str, note: Callable[[str], None]) -> None:
        for name, problem in problems.items():
            note(f"checkpoint {name} is damaged ({problem}); resuming from {chosen}")
            if collectives.rank() == 0:
                with contextlib.suppress(OSError):
                    self.folder.set_aside(name)
        collectives.barrier()

    # ---------------------------------------------------------------------------------------------------------- loading

    def load(self, contents: Contents) -> None:
        """Fill master weights, state and random generators from a checkpoint, and publish the weights.

        Raises ConfigError where the checkpoint is of another model, or needs another base model.
        """
        self.check_model(contents)
        self._restore_references(contents.manifest.references)
        self._restore_stored(contents)
        kept = contents.manifest.kinds.keys() | contents.manifest.references.keys()
        for kind in {kind for shard in self.optimizer.shards() for kind in (*shard.state, *shard.served)} - kept:
            self.optimizer.drop(kind)
        self.shards.publish()
        writers = contents.manifest.world_size
        _, metadata = read_header(contents.folder / rank_file(collectives.rank() % writers))
        set_random_state(metadata[RANDOM])

    def check_model(self, contents: Contents) -> None:
        """Raise ConfigError where the checkpoint holds other parameters than this run trains, or refers to another base
        model."""
        stored, own = contents.manifest.parameters, self.shards.shapes
        for name in sorted(stored.keys() | own.keys()):
            if stored.get(name) != own.get(name):
                there, here = (str(list(shapes[name])) if name in shapes else "absent" for shapes in (stored, own))
                raise ConfigError(
                    f"{contents.folder}: saved from another model: {name} is {there} there and {here} in this run"
                )
        own_digest = self.base.digest if self.base is not None else None
        for kind, reference in contents.manifest.references.items():
            if reference.digest != own_digest:
                raise ConfigError(
                    f"{contents.folder}: its {kind} is the model {reference.model} as it was when the run began, and "
                    "model.path now holds other weights; put that model back, or start a new run with another `output`"
                )

    def _restore_references(self, references: Mapping[str, Reference]) -> None:
        """Fill state that equals the base model from the master weights, which are the base model's until something is
        trained or loaded."""
        for kind, reference in references.items():
            assert self.optimizer.num_updates == 0 and not self._has_loaded, (
                f"{kind} equals the base model, whose weights are gone"
            )
            self.optimizer.take_base(kind, DTYPES[reference.dtype])
        self._has_loaded = True

    def _restore_stored(self, contents: Contents) -> None:
        with contextlib.ExitStack() as stack:
            files = {
                name: stack.enter_context(open_regular(contents.folder / name)) for name in contents.manifest.files
            }
            for kind, dtype in contents.manifest.kinds.items():
                tensors = self.shards.flats if kind == WEIGHTS else self.optimizer.new_state(kind, DTYPES[dtype])
                for fragment in self.shards.fragments:
                    self._read(contents, files, kind, fragment, tensors)

    @torch.no_grad()
    def _read(
        self,
        contents: Contents,
        files: Mapping[str, BinaryIO],
        kind: str,
        fragment: Fragment,
        tensors: list[torch.Tensor],
    ) -> None:
        target = self.shards.view(fragment, tensors)
        stored = contents.slices[kind, fragment.name]
        for file, position, start, length in ranges(stored, fragment.offset, fragment.length):
            read_elements(files[file], position, target[start : start + length])


def read_elements(file: BinaryIO, position: int, target: torch.Tensor) -> None:
    """Fill a flat tensor on any device from byte `position` of the file on."""
    if target.device.type == "cpu":
        read_into(file, position, tensor_bytes(target))
        return
    chunk = BLOCK_BYTES // target.element_size()
    buffer = torch.empty(min(chunk, target.numel()), dtype=target.dtype)
    for start in range(0, target.numel(), chunk):
        part = target[start : start + chunk]
        read_into(file, position + start * target.element_size(), tensor_bytes(buffer[: part.numel()]))
        part.copy_(buffer[: part.numel()])
