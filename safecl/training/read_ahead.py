"""What the next step needs, made ready on a thread while this one computes: its rows, and this rank's micro-batches in
pinned memory.

Order and draws are functions of the step, so they are known before it begins; draws that follow losses use those of two
steps before, which are logged by then (safecl.replay.selection.scores).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from safecl.engine.passes.micro_batches import StepBatch, split_step
from safecl.engine.passes.step_rows import StepRow
from safecl.engine.passes.training_engine import TrainingEngine
from safecl.replay import Prefetcher

RowsOfStep = Callable[[int], dict[str, list[StepRow]]]
"""The rows of every gradient of a step of the current task, by name."""


@dataclass(frozen=True)
class Ready:
    """rows: of one gradient, alike on all ranks. batches: what this rank computes of them; None where a teacher is
    asked first."""

    rows: list[StepRow]
    batches: list[StepBatch] | None


class Ahead:
    """Rows and micro-batches of a task's steps, one step ahead. `get` waits for them; a thread begins with the next
    step then."""

    def __init__(self, engine: TrainingEngine, rows_of_step: RowsOfStep, stop: int):
        """stop: the first step of the task that will not be made."""
        self.engine, self.rows_of_step = engine, rows_of_step
        self._prefetcher = Prefetcher(self._load, stop=stop)

    def get(self, step: int) -> dict[str, Ready]:
        return self._prefetcher.get(step)

    @property
    def wait_seconds(self) -> float:
        """How long steps have waited in all."""
        return self._prefetcher.wait_seconds

    def settle(self) -> None:
        """Returns when nothing is being read, so that what a draw has done to the memory's state does not depend on the
        moment."""
        self._prefetcher.settle()

    def close(self) -> None:
        """Waits for what is being read; nothing is read after that."""
        self._prefetcher.close()

    def _load(self, step: int) -> dict[str, Ready]:
        if self.engine.device.type == "cuda":  # a thread begins with the first device, whichever its rank's is
            torch.cuda.set_device(self.engine.device)
        return {name: self._ready(rows) for name, rows in self.rows_of_step(step).items()}

    def _ready(self, rows: list[StepRow]) -> Ready:
        if any(d.asked is not None for row in rows for d in row.distillations):
            return Ready(self._read(rows), None)
        return Ready(rows, self.engine.prepare(rows))

    def _read(self, rows: Sequence[StepRow]) -> list[StepRow]:
        """The same rows, this rank's read already."""
        own = {i for part in split_step(rows, self.engine.layout)[self.engine.rank] for i in part}
        return [_as_read(row) if i in own else row for i, row in enumerate(rows)]


def _as_read(row: StepRow) -> StepRow:
    found = row.load()
    distances = [
        d if d.load is None or d.asked is not None else replace(d, load=_given(d.load())) for d in row.distillations
    ]
    return replace(row, load=_given(found), distillations=tuple(distances))


def _given(value):
    return lambda: value
