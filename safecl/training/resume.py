"""Saves a whole run and resumes it: shards, counters, methods, memory, place in the sequence of tasks, metrics.

A run that is resumed at the same world size is bitwise the uninterrupted one. At another world size, stage or offload
choice it sees the same rows in the same order, and differs only by the rounding of sums.

The checkpoint itself is written and published by safecl.engine.checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from safecl.config import ConfigError, parse_bytes
from safecl.distributed import collectives
from safecl.engine.artifacts.teacher_outputs import relink
from safecl.engine.checkpoint.format import Contents
from safecl.engine.checkpoint.publishing import CheckpointFolder
from safecl.engine.checkpoint.reading import CheckpointReader
from safecl.engine.checkpoint.report import BaseModel, SaveReport
from safecl.engine.checkpoint.writing import CheckpointWriter
from safecl.planning.plans import TaskPlan
from safecl.replay import ReplayError
from safecl.storage.durable import DamagedCheckpoint, read_file
from safecl.storage.sizes import format_bytes, free_bytes
from safecl.training.identity import refuse_other_run, version_notes
from safecl.training.replay_memory import open_memory, vocab_size_of
from safecl.training.run import Run

STATE, MEMORY, METRICS = "state.json", "memory.index", "metrics.jsonl"
MAX_STATE_BYTES = 2**30


@dataclass
class Progress:
    """The place of a run in its sequence of tasks, and what it has counted and measured so far."""

    task: int = 0
    """Index of the current task."""
    parts_done: int = 0
    """Parts of the task that are done, see safecl.training.trainer."""
    skipped_in_a_row: int = 0
    num_tokens: int = 0
    """Tokens that went through the model in training, over all ranks."""
    seconds: float = 0.0
    """Wall-clock time of the run so far, without the time between a stop and the resume."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """All that was measured, in the form of results.json."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """The actions of the run where the gate failed, in the form of results.json; see safecl.training.guard.recovery."""
    learning_rate_factor: float = 1.0
    """Factor of the learning rate after rollbacks."""
    probe: dict[str, Any] | None = None
    """State of the probe; None without one."""


@dataclass
class Resumed:
    """The contents of a checkpoint besides the state of the run, which is restored already."""

    name: str
    progress: Progress
    metrics: bytes
    notes: list[str]


class RunSaver:
    """Saves one run into its folder and restores it from there. All methods but `close` are collective calls."""

    def __init__(self, run: Run, folder: Path, identity: dict[str, Any], base: BaseModel | None = None):
        """identity: see safecl.training.identity.identity_of. base: see CheckpointWriter."""
        self.run, self.folder = run, folder
        self.checkpoints = CheckpointFolder(folder / "checkpoints")
        engine = run.engine
        staging = parse_bytes(run.config.checkpoint.staging)
        self.checkpointer = CheckpointWriter(engine.shards, engine.optimizer, self.checkpoints, base, staging=staging)
        self._reader = CheckpointReader(engine.shards, engine.optimizer, self.checkpoints, base)
        self._identity = identity
        self._memory_versions: dict[str, int] = {}
        self._saving_version: int | None = None
        self.retained: list[int] = []
        """Versions of the memory that are needed besides those of the checkpoints."""

    @property
    def memory_folder(self) -> Path:
        return self.folder / "memory"

    # ----------------------------------------------------------------------------------------------------------- saving

    def save(self, progress: Progress, metrics: bytes, keep: int) -> SaveReport | None:
        """Start to save the run as it is now. Return the report of the previous save, unless `settle` has returned
        it."""
        before = self.settle()
        self.run.settle()
        memory = self.run.memory.state_dict() if self.run.memory is not None else None
        self._saving_version = memory["version"] if memory is not None else None
        state = {
            "progress": dataclasses.asdict(progress),
            "run": state_of(self.run),
            "memory_version": self._saving_version,
            **self._identity,
        }
        files = {STATE: dump_plain(state), METRICS: metrics}
        if memory is not None:
            files[MEMORY] = np.ascontiguousarray(memory["index"]).tobytes()
        self.checkpointer.save(self.run.global_step, keep=keep, files=files)
        return before

    def settle(self) -> SaveReport | None:
        """Wait for the running save. The memory then frees what no checkpoint needs any more."""
        report = self.checkpointer.finish()
        if report is None or report.problem is not None:
            return report
        if self._saving_version is not None and self.run.memory is not None:
            self._memory_versions[report.name] = self._saving_version
            left = collectives.gather_objects([self.checkpoints.names()])[0]
            retain = [version for name, version in self._memory_versions.items() if name in left] + self.retained
            self.run.memory.buffer.publish(self._saving_version, retain)
        return report

    # --------------------------------------------------------------------------------------------------------- resuming

    def resume(self, note: Callable[[str], None], tasks: Sequence[TaskPlan]) -> Resumed | None:
        """Restore the newest whole checkpoint; None where there is no checkpoint.

        Raises ConfigError where all checkpoints are damaged, or belong to another run; the run is then unchanged.
        """
        states: dict[str, dict[str, Any]] = {}
        self._mend_outputs(note)

        def read_state(contents: Contents) -> None:
            state = states[contents.folder.name] = self._read_state(contents)
            refuse_other_run(state, self._identity, str(self.folder))

        def reopen_memory(contents: Contents) -> None:
            self._open_memory(states[contents.folder.name]["memory_version"])

        def load_memory(contents: Contents) -> None:
            self._load_memory(contents, states[contents.folder.name]["memory_version"])

        contents = self._reader.find(note, [read_state, reopen_memory, load_memory])
        if contents is None:
            return None
        state = states[contents.folder.name]
        self._reader.load(contents)
        progress = Progress(**state["progress"])
        restore(self.run, state["run"], tasks[min(progress.task, len(tasks) - 1)])
        self._remember_versions()
        metrics = read_file(contents.folder / METRICS, contents.manifest.files[METRICS].size)
        return Resumed(contents.folder.name, progress, metrics, version_notes(state["versions"]))

    def _mend_outputs(self, note: Callable[[str], None]) -> None:
        run, plan = self.run, self.run.plan
        has_checkpoints = collectives.on_first_rank(lambda: bool(self.checkpoints.names()))
        if has_checkpoints and plan is not None and plan.memory is not None:
            relink(run.engine, plan.memory, run.config, plan.tokenizer, self.memory_folder, note=note)

    def _read_state(self, contents: Contents) -> dict[str, Any]:
        try:
            return json.loads(read_file(contents.folder / STATE, MAX_STATE_BYTES))
        except (ValueError, RecursionError) as error:
            raise DamagedCheckpoint(f"{contents.folder / STATE}: {error}") from None

    def _open_memory(self, version: int | None) -> None:
        run, settings = self.run, self.run.config.memory
        if run.memory is not None:  # opened for a newer checkpoint, which turned out to be damaged
            run.memory.buffer.close()
        run.memory = None
        if version is not None and settings is not None:
            run.memory = open_memory(settings, self.memory_folder, run.seed, vocab_size_of(run.engine))

    def _load_memory(self, contents: Contents, version: int | None) -> None:
        """Read the memory's index. The rows are outside of the checkpoint; one that does not fit them is damaged."""
        if version is None or self.run.memory is None:
            return
        index = read_file(contents.folder / MEMORY, MAX_STATE_BYTES)
        try:
            self.run.memory.buffer.load_state_dict({"version": version, "index": np.frombuffer(index, np.uint8)})
        except ReplayError as error:
            raise DamagedCheckpoint(str(error)) from None

    def _remember_versions(self) -> None:
        for name in self.checkpoints.names():
            try:
                version = json.loads(read_file(self.checkpoints.path / name / STATE, MAX_STATE_BYTES))["memory_version"]
            except (ValueError, KeyError, RecursionError):
                continue
            if version is not None:
                self._memory_versions[name] = version

    def leave_later(self, name: str) -> None:
        """Delete the checkpoints of later steps than `name`, where the run has gone back. A collective call."""
        if collectives.rank() == 0:
            self.checkpoints.discard_after(name)
        collectives.barrier()

    def check_room(self, note: Callable[[str], None], keep: int) -> None:
        """Raise ConfigError where not even one checkpoint fits on the disk; note it where fewer fit than are kept."""
        size = sum(adam_bytes(shape) for shape in self.run.engine.shards.shapes.values())
        free = collectives.gather_objects([free_bytes(self.folder)])[0]
        what = f"a checkpoint takes at least {format_bytes(size)}, and {format_bytes(free)} are free in {self.folder}"
        if free < size:
            raise ConfigError(
                f"output: {what}; free space, choose another folder with output=..., or set checkpoint.every: never"
            )
        if free < (keep + 1) * size:
            note(f"{what}: too little for the {keep + 1} that checkpoint.keep: {keep} needs while saving")

    def close(self, timeout: float | None = None) -> None:
        """Wait for a running save, at most `timeout` seconds, and free everything. Not a collective call.

        A save fails where another rank has died; another message has reported that by then.
        """
        with contextlib.suppress(Exception):
            self.checkpointer.finish(timeout)
        self.checkpointer.close()


def state_of(run: Run) -> dict[str, Any]:
    """Return the state that a resumed run needs besides the shards' state and the memory, as plain values."""
    optimizer = run.engine.optimizer
    return {
        "step": run.step,
        "global_step": run.global_step,
        "skipped_steps": run.skipped_steps,
        "num_updates": optimizer.num_updates,
        "fisher_means": dict(optimizer.fisher_means),
        "active": bool(run.active_methods),
        "previous": run.previous.config.name if run.previous is not None else None,
        "screening": run.screening,
        "steering": run.steering.levels,
        "recorded": [list(key) for key in run.recorded_teachers.keys()],
        "prompts": run.prompt_anchors.names(),
        "scores": [[task, score.name] for task, score in run.row_scores.keys()],
        "methods": {method.name: method.state_dict() for method in run.methods},
    }


def restore(run: Run, state: dict[str, Any], task: TaskPlan) -> None:
    """Put back what `state_of` returned; shards and memory are restored before. A collective call.

    task: the current task when the state was taken; it may have ended, or not begun.
    """
    run.stop_reading()
    if run.screening != state["screening"]:  # a run that goes back has left the flagged rows out already
        run.screen(state["screening"])
    optimizer = run.engine.optimizer
    run.step, run.num_steps, run.task = state["step"], task.num_steps, task
    run.global_step, run.skipped_steps = state["global_step"], state["skipped_steps"]
    run.first_step = run.global_step - run.step
    run.steering.levels = state.get("steering", [])
    optimizer.num_updates, optimizer.fisher_means = state["num_updates"], dict(state["fisher_means"])
    run.active_methods = run.methods_of(task.config.role) if state["active"] else []
    run.online_teachers.resume(task.config.name)
    run.previous = next((each for each in run.tasks if each.config.name == state["previous"]), None)
    for method in run.methods:
        method.load_state_dict(state["methods"][method.name])
    terms = {term.name: term for method in run.methods for term in method.task_terms()}
    tasks = {each.config.name: each for each in [task, *run.tasks]}
    for task_name, term_name in state["recorded"]:
        if (task_name, term_name) in run.recorded_teachers.keys():
            continue
        run.recorded_teachers.reopen(tasks[task_name], terms[term_name])
    for name in state.get("prompts", []):
        run.prompt_anchors.reopen(name)
    scores = {score.name: score for method in run.methods for score in method.scores()}
    for task_name, score_name in state.get("scores", []):
        run.row_scores.reopen(tasks[task_name], scores[score_name])
    run.release_reference()


def adam_bytes(shape: Sequence[int]) -> int:
    """Bytes of a parameter's fp32 weights and its two moments."""
    return 12 * math.prod(shape)


def dump_plain(state: dict[str, Any]) -> bytes:
    """Return the state as JSON. TypeError for a value that JSON would change or lose (tensors, tuples, numbers as
    keys)."""
    text = json.dumps(state)
    _refuse_changed(state, json.loads(text), "")
    return text.encode()


def _refuse_changed(value: Any, back: Any, path: str) -> None:
    if isinstance(value, dict) and list(value) == list(back):
        for key in value:
            _refuse_changed(value[key], back[key], f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for i, (one, other) in enumerate(zip(value, back, strict=True)):
            _refuse_changed(one, other, f"{path}.{i}")
    elif value != back and value == value:  # a NaN comes back as one
        raise TypeError(
            f"{path}: {value!r} would come back as {back!r}; "
            "keep plain numbers, texts, lists and dicts with text as keys"
        )
