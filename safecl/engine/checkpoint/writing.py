"""Saves a run's sharded state from any world size, ZeRO stage and offload.

Every rank copies its own slices into host memory of a bounded size (staging.py), and a thread writes them into the
rank's file. State that fits there holds training up for the copy only; of larger state training waits until all but the
last bytes are on the disk. When all ranks have finished, rank 0 writes the manifest and publishes the checkpoint by
rename. The threads communicate over a process group of their own, so that their calls cannot get between the training's
collectives. There is at most one save at a time.

In ZeRO stage 0 each rank writes a part of the replicated state.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from safecl.distributed import collectives, devices, progress, recorder
from safecl.engine.checkpoint.format import (
    RANDOM,
    WEIGHTS,
    Manifest,
    Reference,
    Slice,
    arrange,
    rank_file,
    write_slices,
)
from safecl.engine.checkpoint.publishing import CheckpointFolder
from safecl.engine.checkpoint.random_state import random_state
from safecl.engine.checkpoint.report import BaseModel, SaveReport
from safecl.engine.checkpoint.staging import Staging
from safecl.engine.model.dtypes import DTYPE_NAMES, DTYPES
from safecl.engine.zero.optimizer import ShardAdamW
from safecl.engine.zero.shards import Fragment, ShardMap
from safecl.kernels.finite import count_nonfinite
from safecl.storage import durable
from safecl.storage.durable import FileRecord, sync_folder, write_file

T = TypeVar("T")

_WRITER_NICENESS = 10  # training comes first where both want the same core
_SLOWEST_DISK = 10e6
"""Bytes per second. A rank waits for others as long as such a disk needs for the whole checkpoint, and a while more."""

STAGING_BYTES = 2 * 2**30
"""Bytes of host memory that a save takes on each rank, where the config says nothing else."""


@dataclass
class _Save:
    """A running save on this rank."""

    step: int
    slices: list[tuple[Slice, int]]
    num_bytes: int
    random: str
    files: Mapping[str, bytes]
    kinds: dict[str, str]
    references: dict[str, Reference]
    keep: int
    seconds_blocked: float = 0.0
    report: SaveReport | None = None
    failure: BaseException | None = None


class CheckpointWriter:
    """Saves weights and optimizer state of one engine. `save` and `finish` are collective calls.

        writer.save(step, keep=2, files={"state.json": b"..."})    # returns when all is copied; rank 0's files are
                                                                   # written
        report = writer.finish()                                   # waits until the checkpoint is on the disk

    A kind of state whose name begins with an underscore is temporary and is not saved. With `base`, state that equals
    the run's first weights is not stored but named by their hash; a checkpoint can then be loaded only while these
    weights are available.
    """

    def __init__(
        self,
        shards: ShardMap,
        optimizer: ShardAdamW,
        folder: CheckpointFolder,
        base: BaseModel | None = None,
        *,
        staging: int = STAGING_BYTES,
    ):
        """staging: bytes of host memory that copies take at most on this rank."""
        self.shards, self.optimizer, self.folder, self.base = shards, optimizer, folder, base
        self.rank, self.world_size = collectives.rank(), collectives.world_size()
        self._fragments = list(own_fragments(shards, self.rank, self.world_size))
        self._group = recorder.background_group() if self.world_size > 1 else None
        self._staging = Staging(staging, locked=devices.on_gpu())
        self._save: _Save | None = None
        self._thread: threading.Thread | None = None

    def close(self) -> None:
        """Give back the process group and the buffer. Call `finish` before."""
        if self._group is not None and not self.is_writing:
            dist.destroy_process_group(self._group)
            self._group = None
        if not self.is_writing:
            self._staging.free()

    def save(self, step: int, *, keep: int, files: Mapping[str, bytes]) -> None:
        """Start to save the state after global step `step`. Call `finish` before the next save.

        Args: `keep`, number of whole checkpoints that stay; `files`, further files of the checkpoint (rank 0's are
        written).
        """
        assert self._save is None, "call `finish` before the next save"
        began = time.perf_counter()
        tensors = self._tensors_by_kind()
        references = self._take_references(tensors)
        kinds = {kind: DTYPE_NAMES[flats[0].dtype] for kind, flats in tensors.items()}
        slices = arrange(
            Slice(kind, f.name, f.offset, f.length, kinds[kind]) for kind in tensors for f in self._fragments
        )
        size = sum(one.nbytes for one, _ in slices)
        if self._group is not None:
            recorder.set_timeout(self._group, self._patience(size))
        self._save = save = _Save(step, slices, size, random_state(), dict(files), kinds, references, keep)
        self._staging.begin(size)
        self._thread = threading.Thread(
            target=self._write_in_background, args=(save,), name="safecl-checkpoint", daemon=True
        )
        self._thread.start()
        self._copy(slices, tensors, size)
        save.seconds_blocked = time.perf_counter() - began

    def finish(self, timeout: float | None = None) -> SaveReport | None:
        """Wait for the running save and return its report, the same on all ranks.

        Return None where there is no save, or it takes longer than `timeout` seconds.
        """
        if self._save is None or self._thread is None:
            return None
        self._thread.join(timeout)
        if self._thread.is_alive():
            return None
        save, self._save, self._thread = self._save, None, None
        if save.failure is not None:
            raise save.failure
        if save.report is not None:
            save.report.seconds_blocked = save.seconds_blocked
        return save.report

    def peek(self) -> SaveReport | None:
        """Return the report of a save that this rank has finished, without waiting; `finish` still returns it. Not a
        collective call."""
        if self._save is None or self.is_writing or self._save.report is None:
            return None
        self._save.report.seconds_blocked = self._save.seconds_blocked
        return self._save.report

    @property
    def is_writing(self) -> bool:
        """True while this rank's thread is at work."""
        return self._thread is not None and self._thread.is_alive()

    # ------------------------------------------------------------------------------------------------- the copied state

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
        """Remove from `tensors` the kinds that equal the base model, and return a reference for each."""
        if self.base is None:
            return {}
        equal = {kind: self.optimizer.dtype_of(kind) for kind in sorted(self.optimizer.equal_base)}
        for kind in equal:
            tensors.pop(kind, None)
        return {kind: Reference(self.base.name, self.base.digest, DTYPE_NAMES[dtype]) for kind, dtype in equal.items()}

    @torch.no_grad()
    def _copy(self, slices: list[tuple[Slice, int]], tensors: dict[str, list[torch.Tensor]], size: int) -> None:
        """Copy the data of this rank's file to the staging buffers, in the file's order."""
        fragments = {(f.name, f.offset): f for f in self._fragments}
        begins = [position for _, position in slices]

        def copy(low: int, high: int, target: torch.Tensor) -> None:
            for one, position in slices[bisect.bisect_right(begins, low) - 1 : bisect.bisect_left(begins, high)]:
                begin, end = max(low, position), min(high, position + one.nbytes)
                if begin < end:
                    source = self.shards.view(fragments[one.name, one.offset], tensors[one.kind])
                    item = source.element_size()
                    part = source[(begin - position) // item : (end - position) // item]
                    target[begin - low : end - low].view(source.dtype).copy_(part, non_blocking=True)
            if devices.on_gpu():
                torch.cuda.synchronize()

        self._staging.fill(size, copy)
        durable.at("copied")

    # ------------------------------------------------------------------------------------------------ in the background

    def _write_in_background(self, save: _Save) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _WRITER_NICENESS)
        began = time.perf_counter()
        try:
            save.report = self._write_and_publish(save)
            save.report.seconds_written = time.perf_counter() - began
        except BaseException as error:
            save.failure = error
        finally:
            self._staging.abandon()

    def _write_and_publish(self, save: _Save) -> SaveReport:
        """Write and publish the checkpoint. The ranks agree three times: the folder is there, all files are on the
        disk, the checkpoint is published."""
        size = save.num_bytes + sum(map(len, save.files.values()))
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
        blocks = finite_blocks(save.slices, self._staging.blocks())
        records = {name: write_slices(folder / name, save.slices, blocks, {RANDOM: save.random})}
        if self.rank == 0:
            records |= {name: write_file(folder / name, [content]) for name, content in save.files.items()}
        sync_folder(folder)
        return records

    def _publish(self, save: _Save, report: SaveReport, files: dict[str, FileRecord]) -> None:
        manifest = Manifest(
            report.name, save.step, self.world_size, files, self.shards.shapes, save.kinds, save.references, finite=True
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

    def _patience(self, size: int) -> float:
        """Seconds that this rank, which writes `size` bytes, waits for another one that writes."""
        total = size * self.world_size
        return collectives.timeout_of_collectives(progress.SECONDS_WITHOUT_A_BEAT["save"] + total / _SLOWEST_DISK)

    def _exchange(self, item: T) -> list[T]:
        """Return the items of all ranks, in rank order, over the writers' own process group."""
        if self._group is None:
            return [item]
        progress.block_saved()
        items = [item] * self.world_size
        dist.all_gather_object(items, item, group=self._group)
        return items


def finite_blocks(slices: list[tuple[Slice, int]], blocks: Iterator[memoryview]) -> Iterator[memoryview]:
    """Pass on the blocks of a file's data. Raises OSError for a value that is NaN or infinite: a checkpoint of such a
    state would displace the last one that can be used."""
    begins, low = [position for _, position in slices], 0
    for block in blocks:
        high = low + len(block)
        for one, position in slices[bisect.bisect_right(begins, low) - 1 : bisect.bisect_left(begins, high)]:
            begin, end = max(low, position), min(high, position + one.nbytes)
            if begin < end and (count := count_nonfinite(_values(block[begin - low : end - low], one.dtype))):
                values = "value is" if count == 1 else "values are"
                raise OSError(f"{count:,} {values} not finite (NaN or infinite), in its {one.kind} of {one.name}")
        yield block
        low = high


def _values(data: memoryview, dtype: str) -> torch.Tensor:
    return torch.frombuffer(data, dtype=DTYPES[dtype])


def own_fragments(shards: ShardMap, rank: int, world_size: int) -> Iterator[Fragment]:
    """Yield the fragments that this rank writes: its own shards, or its part of replicated ones."""
    if not shards.replicated:
        yield from shards.fragments
        return
    begin, end, position = shards.numel * rank // world_size, shards.numel * (rank + 1) // world_size, 0
    for f in shards.fragments:
        low, high = max(begin - position, 0), min(end - position, f.length)
        if low < high:
            yield Fragment(f.name, f.offset + low, high - low, f.flat, f.start + low)
        position += f.length


def _problem_of(work: Callable[[], object]) -> str | None:
    """Do the work and return the message of its OSError; None where there is none."""
    try:
        work()
    except OSError as error:
        return error.strerror or str(error)
    return None
