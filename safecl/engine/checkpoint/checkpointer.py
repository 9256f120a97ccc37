"""Saving and loading a run's sharded state, whatever world size, ZeRO stage and offload it is saved from and loaded
into.

Saving: every rank copies its own slices into one host buffer (the step waits for this copy only), then a thread writes
the buffer into the rank's file. When all ranks have finished, rank 0 writes the manifest and publishes the checkpoint
by rename. The threads agree over a process group of their own, so they cannot get between the training's collectives.
One save is under way at a time.

Loading: all ranks agree that a checkpoint is whole before anything is touched, else on an older one. A rank then reads
the byte ranges that its own shards need, straight into them, or through a buffer of 16 MiB where they are not in host
memory.

Host memory: the buffer takes this rank's share of weights and state once more. With ZeRO stage 0 the ranks share the
writing.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist

from safecl.config import ConfigError
from safecl.distributed import collectives
from safecl.engine.checkpoint.folder import CheckpointFolder
from safecl.engine.checkpoint.format import (
    Contents,
    Manifest,
    OtherFormat,
    Reference,
    Slice,
    arrange,
    check_hashes,
    ranges,
    rank_file,
    read_contents,
    write_slices,
)
from safecl.engine.checkpoint.random_state import random_state, set_random_state
from safecl.engine.checkpoint.reading import own_fragments, read_elements
from safecl.engine.checkpoint.report import BaseModel, SaveReport
from safecl.engine.model.dtypes import DTYPE_NAMES, DTYPES
from safecl.engine.zero.optimizer import ShardAdamW
from safecl.engine.zero.shards import Fragment, ShardMap
from safecl.storage import durable
from safecl.storage.durable import DamagedCheckpoint, FileRecord, open_regular, sync_folder, write_file
from safecl.storage.safetensors_file import read_header

WEIGHTS = "weights"
RANDOM = "random"

_WRITER_NICENESS = 10  # training comes first where both want the same core
_LONGEST_WRITE = timedelta(hours=6)


@dataclass
class _Save:
    """A save under way on this rank."""

    step: int
    slices: list[tuple[Slice, int]]
    image: torch.Tensor
    random: str
    files: Mapping[str, bytes]
    kinds: dict[str, str]
    references: dict[str, Reference]
    keep: int
    seconds_blocked: float
    report: SaveReport | None = None
    failure: BaseException | None = None


class Checkpointer:
    """Saves and loads weights and optimizer state of one engine. Every call is a collective one, made on all ranks
    alike.

        checkpointer.save(step, keep=2, files={"state.json": b"..."})    # returns after the copy; rank 0's files count
        report = checkpointer.finish()                                   # waits until it is on the disk
        contents = checkpointer.find(note=print)                         # the newest whole checkpoint, or None
        checkpointer.load(contents)

    A kind of state whose name begins with an underscore is temporary and is not saved. With `base`, state that equals
    the weights with which the run began is named instead of stored; a checkpoint can then be loaded only while the
    weights are still these.
    """

    def __init__(
        self, shards: ShardMap, optimizer: ShardAdamW, folder: CheckpointFolder, base: BaseModel | None = None
    ):
        self.shards, self.optimizer, self.folder, self.base = shards, optimizer, folder, base
        self.rank, self.world_size = collectives.rank(), collectives.world_size()
        self._fragments = list(own_fragments(shards, self.rank, self.world_size))
        self._group = dist.new_group(backend="gloo", timeout=_LONGEST_WRITE) if self.world_size > 1 else None
        self._image = torch.zeros(0, dtype=torch.uint8)
        self._save: _Save | None = None
        self._thread: threading.Thread | None = None
        self._loaded = False

    def close(self) -> None:
        """Gives back the process group and the buffer. Call `finish` before."""
        if self._group is not None and not self.is_writing:
            dist.destroy_process_group(self._group)
            self._group = None
        self._image = torch.zeros(0, dtype=torch.uint8)

    # ----------------------------------------------------------------------------------------------------------- saving

    def save(self, step: int, *, keep: int, files: Mapping[str, bytes]) -> None:
        """Starts saving the state after global step `step`; a save that is still under way is waited for.

        Args: `keep`, whole checkpoints that stay; `files`, further files of the checkpoint (rank 0's are written).
        """
        assert self._save is None, "ask `finish` how the save before ended"
        began = time.perf_counter()
        tensors = self._tensors_by_kind()
        references = self._take_references(tensors)
        kinds = {kind: DTYPE_NAMES[flats[0].dtype] for kind, flats in tensors.items()}
        slices = arrange(
            Slice(kind, f.name, f.offset, f.length, kinds[kind]) for kind in tensors for f in self._fragments
        )
        self._copy(slices, tensors)
        blocked = time.perf_counter() - began
        self._save = _Save(step, slices, self._image, random_state(), dict(files), kinds, references, keep, blocked)
        self._thread = threading.Thread(
            target=self._write_in_background, args=(self._save,), name="safecl-checkpoint", daemon=True
        )
        self._thread.start()

    def _tensors_by_kind(self) -> dict[str, list[torch.Tensor]]:
        shards = self.optimizer.shards()
        kept = {kind for shard in shards for kind in shard.state if not kind.startswith("_")}
        served = {kind for shard in shards for kind in shard.served} if self.base is None else set()
        kinds = sorted(kept | served)
        for kind in kept:
            for shard in shards:
                assert shard.state[kind].numel() == shard.param.numel(), (
                    f"state {kind!r} has not the layout of its shard"
                )
        return {WEIGHTS: self.shards.flats, **{kind: self.optimizer.tensors(kind) for kind in kinds}}

    def _take_references(self, tensors: dict[str, list[torch.Tensor]]) -> dict[str, Reference]:
        """Takes out of `tensors` what equals the base model, and says so."""
        if self.base is None:
            return {}
        equal = {kind: self.optimizer.dtype_of(kind) for kind in sorted(self.optimizer.equal_base)}
        for kind in equal:
            tensors.pop(kind, None)
        return {kind: Reference(self.base.name, self.base.digest, DTYPE_NAMES[dtype]) for kind, dtype in equal.items()}

    @torch.no_grad()
    def _copy(self, slices: list[tuple[Slice, int]], tensors: dict[str, list[torch.Tensor]]) -> None:
        """Fills the host buffer, which is the data of the file to be written."""
        size = sum(one.nbytes for one, _ in slices)
        if self._image.numel() != size:
            self._image = torch.zeros(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self._image = torch.empty(size, dtype=torch.uint8, pin_memory=self.shards.flats[0].is_cuda)
        fragments = {(f.name, f.offset): f for f in self._fragments}
        for one, position in slices:
            source = self.shards.view(fragments[one.name, one.offset], tensors[one.kind])
            target = self._image[position : position + one.nbytes].view(source.dtype)
            target.copy_(source, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        durable.at("copied")

    def finish(self, timeout: float | None = None) -> SaveReport | None:
        """Waits for the save under way and says how it ended, the same on all ranks; None where there is none, or time
        is up."""
        if self._save is None:
            return None
        self._thread.join(timeout)
        if self._thread.is_alive():
            return None
        save, self._save, self._thread = self._save, None, None
        if save.failure is not None:
            raise save.failure
        return save.report

    def peek(self) -> SaveReport | None:
        """How the save ended that this rank's thread is done with, without waiting and without giving it up. Not a
        collective call."""
        return None if self._save is None or self.is_writing else self._save.report

    @property
    def is_writing(self) -> bool:
        """True while this rank's thread is at work."""
        return self._thread is not None and self._thread.is_alive()

    # ------------------------------------------------------------------------------------------------ in the background

    def _write_in_background(self, save: _Save) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _WRITER_NICENESS)
        began = time.perf_counter()
        try:
            save.report = self._write_and_publish(save)
            save.report.seconds_blocked, save.report.seconds_written = save.seconds_blocked, time.perf_counter() - began
        except BaseException as error:
            save.failure = error

    def _write_and_publish(self, save: _Save) -> SaveReport:
        """Three agreements of the ranks: the folder is there, all files are on the disk, the checkpoint is
        published."""
        size = save.image.numel() + sum(map(len, save.files.values()))
        total = sum(self._exchange(size))
        begun = self._exchange(_problem_of(lambda: self.folder.begin(total)) if self.rank == 0 else None)[0]
        if begun is not None:
            return SaveReport(f"of step {save.step}", problem=begun)
        records: dict[str, FileRecord] = {}
        problem = _problem_of(lambda: records.update(self._write_files(save)))
        written = self._exchange((records, problem))
        name = self.folder.free_name(save.step) if self.rank == 0 else ""
        report = SaveReport(name, total, problem=next((problem for _, problem in written if problem is not None), None))
        if self.rank == 0 and report.problem is None:
            self._publish(save, report, {name: record for records, _ in written for name, record in records.items()})
        elif self.rank == 0:
            self.folder.abandon()
        return self._exchange(report)[0]

    def _write_files(self, save: _Save) -> dict[str, FileRecord]:
        folder, name = self.folder.partial, rank_file(self.rank)
        records = {name: write_slices(folder / name, save.slices, save.image.numpy().data, {RANDOM: save.random})}
        if self.rank == 0:
            records |= {name: write_file(folder / name, [content]) for name, content in save.files.items()}
        sync_folder(folder)
        return records

    def _publish(self, save: _Save, report: SaveReport, files: dict[str, FileRecord]) -> None:
        manifest = Manifest(
            report.name, save.step, self.world_size, files, self.shards.shapes, save.kinds, save.references
        )
        report.problem = _problem_of(lambda: self.folder.publish(manifest))
        if report.problem is not None:
            self.folder.abandon()
            return
        for what, work in (
            ("`latest`", lambda: self.folder.point_to(report.name)),
            ("pruning", lambda: self.folder.prune(save.keep)),
        ):
            if (problem := _problem_of(work)) is not None:
                report.notes.append(f"{what}: {problem}")

    def _exchange(self, item: Any) -> list[Any]:
        """What every rank says, in rank order, over the writers' own process group."""
        if self._group is None:
            return [item]
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item, group=self._group)
        return items

    # ---------------------------------------------------------------------------------------------------------- loading

    def find(self, note: Callable[[str], None], checks: Sequence[Callable[[Contents], None]] = ()) -> Contents | None:
        """The newest checkpoint that all ranks find whole; None where there is none at all. Damaged newer ones are set
        aside, and told.

        `checks` look at what else must be right and raise DamagedCheckpoint; all ranks have passed one before any
        begins with the next. Raises ConfigError where there are checkpoints and none of them is whole, or the newest is
        of another version of the format.
        """
        problems: dict[str, str] = {}
        for name in collectives.gather_objects([self.folder.names()])[0]:
            contents, problem = self._examine(self.folder.path / name, checks)
            if contents is not None:
                self._set_aside(problems, name, note)
                return contents
            problems[name] = problem
        if problems:
            raise ConfigError(
                f"{self.folder.path}: no checkpoint is whole, so the run cannot go on:\n"
                + "\n".join(f"  {name}: {problem}" for name, problem in problems.items())
                + "\nRestore one from a backup, or move the run folder away to start anew."
            )
        return None

    def _examine(self, folder: Path, checks: Sequence[Callable[[Contents], None]]) -> tuple[Contents | None, str]:
        """(contents, "") where all ranks agree that the checkpoint is whole, else (None, what one of them found)."""
        contents, problem = self._agree(lambda: self._read_contents(folder))
        for check in checks:
            if problem is None:
                _, problem = self._agree(lambda check=check: check(contents))
        return (contents, "") if problem is None else (None, problem)

    def _read_contents(self, folder: Path) -> Contents:
        try:
            contents = read_contents(folder)
        except OtherFormat as error:
            raise ConfigError(
                f"{error}; go on with the safecl that wrote it, or start a new run with another `output`"
            ) from None
        check_hashes(folder, contents.manifest, self.rank, self.world_size)
        return contents

    def _agree(self, work: Callable[[], Any]) -> tuple[Any, str | None]:
        """(what the work gave, None) where it went well on all ranks, else (None, what the first of the others
        says)."""
        try:
            value, problem = work(), None
        except (DamagedCheckpoint, OSError) as error:
            value, problem = None, str(error)
        found = [problem for problem in collectives.gather_objects([problem]) if problem is not None]
        return (None, found[0]) if found else (value, None)

    def _set_aside(self, problems: Mapping[str, str], chosen: str, note: Callable[[str], None]) -> None:
        for name, problem in problems.items():
            note(f"checkpoint {name} is damaged ({problem}); going on from {chosen}")
            if self.rank == 0:
                with contextlib.suppress(OSError):
                    self.folder.set_aside(name)
        collectives.barrier()

    def load(self, contents: Contents) -> None:
        """Fills masters, state and random generators from a checkpoint, and publishes the weights.

        Raises ConfigError where the checkpoint is of another model, or needs another base model.
        """
        self.check_model(contents)
        self._restore_references(contents.manifest.references)
        with contextlib.ExitStack() as stack:
            files = {
                name: stack.enter_context(open_regular(contents.folder / name)) for name in contents.manifest.files
            }
            for kind, dtype in contents.manifest.kinds.items():
                tensors = self.shards.flats if kind == WEIGHTS else self.optimizer.new_state(kind, DTYPES[dtype])
                for fragment in self.shards.fragments:
                    self._read(contents, files, kind, fragment, tensors)
        for kind in {
            kind for shard in self.optimizer.shards() for kind in (*shard.state, *shard.served)
        } - self._kinds_of(contents):
            self.optimizer.drop(kind)
        self.shards.publish()
        writers = contents.manifest.world_size
        _, metadata = read_header(contents.folder / rank_file(self.rank % writers))
        set_random_state(metadata[RANDOM])

    def check_model(self, contents: Contents) -> None:
        """ConfigError where the checkpoint holds other parameters than those that this run trains."""
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
                    f"{contents.folder}: its {kind} is the model {reference.model} as it was when the run began, and model.path now "
                    "holds other weights; put that model back, or start a new run with another `output`"
                )

    @staticmethod
    def _kinds_of(contents: Contents) -> set[str]:
        return contents.manifest.kinds.keys() | contents.manifest.references.keys()

    def _restore_references(self, references: Mapping[str, Reference]) -> None:
        """Fills state that equals the base model, whose weights the masters hold as long as nothing has been trained or
        loaded."""
        for kind, reference in references.items():
            assert self.optimizer.num_updates == 0 and not self._loaded, (
                f"{kind} equals the base model, whose weights are gone"
            )
            self.optimizer.take_base(kind, DTYPES[reference.dtype])
        self._loaded = True

    @torch.no_grad()
    def _read(
        self, contents: Contents, files: dict[str, BinaryIO], kind: str, fragment: Fragment, tensors: list[torch.Tensor]
    ) -> None:
        target = self.shards.view(fragment, tensors)
        for file, position, start, length in ranges(
            contents.slices[kind, fragment.name], fragment.offset, fragment.length
        ):
            read_elements(files[file], position, target[start : start + length])


def _problem_of(work: Callable[[], object]) -> str | None:
    """Why the work could not be done, in words; None where it was."""
    try:
        work()
    except OSError as error:
        return error.strerror or str(error)
    return None
