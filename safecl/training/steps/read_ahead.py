"""Reads the next step on a thread while this one computes: its rows, and this rank's micro-batches in pinned memory.

Order and draws are functions of the step, so they are known before the step begins. Draws that follow losses use the
losses of two steps before, which are logged by then (safecl.replay.selection.scores).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from safecl.engine.passes.micro_batches import StepBatch, split_step
from safecl.engine.passes.step_rows import Distillation, StepRow
from safecl.engine.passes.training_engine import TrainingEngine
from safecl.replay import Prefetcher

RowsOfStep = Callable[[int], dict[str, list[StepRow]]]
"""The rows of every gradient of a step of the current task, by name."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ready:
    """The rows of a gradient, ready for its pass. rows: all of the step, the same list on every rank. batches: this
    rank's micro-batches; None where an online teacher must answer first, or labels need their means."""

    rows: list[StepRow]
    batches: list[StepBatch] | None


class ReadAhead:
    """Rows and micro-batches of a task's steps. `get` waits for a step, and starts to read the next one."""

    def __init__(self, engine: TrainingEngine, rows_of_step: RowsOfStep, stop: int):
        """stop: number of the task's steps; steps from there on are not read."""
        self.engine, self.rows_of_step = engine, rows_of_step
        self._prefetcher = Prefetcher(self._load, stop=stop)

    def get(self, step: int) -> dict[str, Ready]:
        return self._prefetcher.get(step)

    @property
    def wait_seconds(self) -> float:
        """Seconds that steps have waited in total."""
        return self._prefetcher.wait_seconds

    def settle(self) -> None:
        """Wait until nothing is being read, so that the memory's state does not depend on the moment."""
        self._prefetcher.settle()

    def close(self) -> None:
        """Wait for the running read; nothing is read after that."""
        self._prefetcher.close()

    def _load(self, step: int) -> dict[str, Ready]:
        if self.engine.device.type == "cuda":  # a new thread uses the first device, whichever device its rank has
            torch.cuda.set_device(self.engine.device)
        return {name: self._ready(rows) for name, rows in self.rows_of_step(step).items()}

    def _ready(self, rows: list[StepRow]) -> Ready:
        if any(row.labels is not None or any(d.asked is not None for d in row.distillations) for row in rows):
            return Ready(self._read(rows), None)
        return Ready(rows, self.engine.prepare(rows))

    def _read(self, rows: Sequence[StepRow]) -> list[StepRow]:
        """Return the same rows with this rank's own already in memory."""
        own = {i for part in split_step(rows, self.engine.layout)[self.engine.rank] for i in part}
        return [_in_memory(row) if i in own else row for i, row in enumerate(rows)]


def _in_memory(row: StepRow) -> StepRow:
    loaded = row.load()
    return replace(
        row, load=functools.partial(_same, loaded), distillations=tuple(_loaded(d) for d in row.distillations)
    )


def _loaded(distillation: Distillation) -> Distillation:
    """Read recorded outputs; the answer of an online teacher is not there yet."""
    if distillation.load is None or distillation.asked is not None:
        return distillation
    return replace(distillation, load=functools.partial(_same, distillation.load()))


def _same(value: Value) -> Value:
    return value
