"""The last state of a run that passed its gate, to go back to: in host memory, and on the disk for a resumed run.

    passed/step-00000120/     a whole checkpoint (safecl.engine.checkpoint), anchors included

Going back restores what a resumed run restores: weights, optimizer, methods, memory, generators, and the place in the
sequence of tasks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from safecl.config import parse_bytes
from safecl.distributed import collectives
from safecl.engine.checkpoint.format import WEIGHTS
from safecl.engine.checkpoint.publishing import CheckpointFolder, step_of
from safecl.engine.checkpoint.random_state import random_state, set_random_state
from safecl.engine.checkpoint.reading import CheckpointReader
from safecl.engine.checkpoint.writing import CheckpointWriter
from safecl.planning.plans import TaskPlan
from safecl.storage.durable import DamagedCheckpoint, read_file
from safecl.training.resume import MAX_STATE_BYTES, MEMORY, STATE, Progress, RunSaver, dump_plain, restore, state_of
from safecl.training.run import Run

FOLDER = "passed"


@dataclass
class _HostCopy:
    """A state of this rank in host memory."""

    state: dict[str, Any]
    """Progress, the run, and the memory's version."""
    memory: bytes
    tensors: dict[str, list[torch.Tensor]]
    """Weights and state by kind, as the shards hold them; without what the reference store serves."""
    served: set[str]
    equal_base: set[str]
    random: str


class PassedState:
    """Keeps one state of a run and puts it back. All methods but `close` are collective calls."""

    def __init__(self, run: Run, saver: RunSaver, folder: Path):
        """folder: the run folder."""
        self.run, self.saver = run, saver
        engine = run.engine
        self.folder = CheckpointFolder(folder / FOLDER)
        staging = parse_bytes(run.config.checkpoint.staging)
        self._writer = CheckpointWriter(engine.shards, engine.optimizer, self.folder, staging=staging)
        self._reader = CheckpointReader(engine.shards, engine.optimizer, self.folder)
        self._host: _HostCopy | None = None

    @property
    def step(self) -> int | None:
        """Global step of the kept state; None where none is kept that this run has come to. A collective call."""
        names = collectives.gather_objects([self.folder.names()])[0]
        steps = [self._host.state["run"]["global_step"]] if self._host is not None else [step_of(n) for n in names[:1]]
        return next((int(step) for step in steps if step <= self.run.global_step), None)

    def begin(self, resumed: bool) -> None:
        """Take over the state that a resumed run has kept; one of an earlier start is removed. A collective call."""
        if not resumed and collectives.rank() == 0:
            shutil.rmtree(self.folder.path, ignore_errors=True)
        collectives.barrier()
        for name in self.folder.names()[:1]:
            with contextlib.suppress(ValueError, KeyError, RecursionError, DamagedCheckpoint):
                version = json.loads(read_file(self.folder.path / name / STATE, MAX_STATE_BYTES))["memory_version"]
                self.saver.retained = [version] if version is not None else []

    def keep(self, progress: Progress) -> None:
        """Keep the run as it is now, in the place of the state before. progress: the run's place to come back to."""
        self._writer.finish()
        self.run.settle()
        memory = self.run.memory.state_dict() if self.run.memory is not None else None
        version = memory["version"] if memory is not None else None
        state = {"progress": dataclasses.asdict(progress), "run": state_of(self.run), "memory_version": version}
        index = np.ascontiguousarray(memory["index"]).tobytes() if memory is not None else b""
        text = dump_plain(state)
        self._host = self._copy(json.loads(text), index)
        files = {STATE: text} | ({MEMORY: index} if memory is not None else {})
        self._writer.save(self.run.global_step, keep=1, files=files)
        self.saver.retained = [version] if version is not None else []

    @torch.no_grad()
    def _copy(self, state: dict[str, Any], index: bytes) -> _HostCopy:
        optimizer = self.run.engine.optimizer
        shards = optimizer.shards()
        kinds = {kind for shard in shards for kind in shard.state if not kind.startswith("_")}
        tensors = {kind: optimizer.tensors(kind) for kind in sorted(kinds)} | {WEIGHTS: self.run.engine.shards.flats}
        copies = {kind: [value.to("cpu", copy=True) for value in values] for kind, values in tensors.items()}
        served = {kind for shard in shards for kind in shard.served}
        return _HostCopy(state, index, copies, served, set(optimizer.equal_base), random_state())

    def go_back(self, tasks: list[TaskPlan]) -> Progress:
        """Put the kept state back and return its place in the sequence of tasks. tasks: those of the whole run."""
        self._writer.finish()
        self.saver.settle()  # the memory knows no later version once it is put back
        self.run.stop_reading()
        served = {kind for shard in self.run.engine.optimizer.shards() for kind in shard.served}
        in_memory = self._host is not None and self._host.served <= served
        if collectives.any_rank(not in_memory):
            state, index = self._load_from_disk()
        else:
            assert self._host is not None
            self._load_from_memory(self._host)
            state, index = self._host.state, self._host.memory
        self._restore_memory(state["memory_version"], index)
        progress = Progress(**state["progress"])
        restore(self.run, state["run"], tasks[min(progress.task, len(tasks) - 1)])
        return progress

    @torch.no_grad()
    def _load_from_memory(self, kept: _HostCopy) -> None:
        engine = self.run.engine
        optimizer = engine.optimizer
        for kind in {kind for shard in optimizer.shards() for kind in (*shard.state, *shard.served)}:
            if kind not in kept.tensors and kind not in kept.served:
                optimizer.drop(kind)
        for kind, values in kept.tensors.items():
            if kind == WEIGHTS:
                targets = engine.shards.flats
            else:
                targets = optimizer.new_state(kind, values[0].dtype)
            for target, value in zip(targets, values, strict=True):
                target.copy_(value)
        optimizer.equal_base = set(kept.equal_base)
        engine.shards.publish()
        set_random_state(kept.random)

    def _load_from_disk(self) -> tuple[dict[str, Any], bytes]:
        contents = self._reader.find(self.run.log)
        assert contents is not None, "`step` says that a state is kept"
        self._reader.load(contents)
        state = json.loads(read_file(contents.folder / STATE, MAX_STATE_BYTES))
        has_memory = state["memory_version"] is not None
        return state, read_file(contents.folder / MEMORY, MAX_STATE_BYTES) if has_memory else b""

    def _restore_memory(self, version: int | None, index: bytes) -> None:
        """Put the memory's index back; a run that had not filled its memory fills it again."""
        memory = self.run.memory
        if memory is not None and version is None:
            memory.buffer.close()
            self.run.memory = None
        elif memory is not None:
            memory.buffer.load_state_dict({"version": version, "index": np.frombuffer(index, np.uint8)})
        collectives.barrier()

    def finish(self) -> None:
        """Remove the state of a run that has its results."""
        self._writer.finish()
        if collectives.rank() == 0:
            shutil.rmtree(self.folder.path, ignore_errors=True)

    def close(self, timeout: float) -> None:
        """Wait for a running save, at most `timeout` seconds, and free everything. Not a collective call."""
        with contextlib.suppress(Exception):
            self._writer.finish(timeout)
        self._writer.close()
        self._host = None
