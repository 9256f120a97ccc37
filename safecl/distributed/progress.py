"""The place of this process in its work, for the watchdog: its phase, and a count that grows with everything it does.

    with progress.phase("evaluation"):
        for token in ...:
            progress.beat()

A phase may last for any time; it hangs where no beat comes for as long as its limit. Imports no torch.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

HangTimeout = float | Literal["auto", "never"]

STEP = "step"
SECONDS_WITHOUT_A_BEAT = {
    "collective start": 1800.0,
    "load": 1800.0,
    "preparation": 1800.0,
    "evaluation": 7200.0,
    "save": 1800.0,
    "export": 1800.0,
}
"""Limits of the phases but `step`. A beat comes with every token of an answer, every micro-batch, every tensor that is
read or written; what has none is longest where a judge scores all answers in one call."""
SECONDS_OF_FIRST_STEPS = 1800.0
"""Limit of a step that has no history yet: kernels are compiled in it."""
STEPS_OF_HISTORY = 3


def step_limit(timeout: HangTimeout, seconds: list[float]) -> float:
    """Seconds that a step may be without a beat: 10 x the median of the steps before, plus 60; or what the config says.

    timeout: train.hang_timeout. seconds: durations of the steps so far.
    """
    if timeout == "never":
        return float("inf")
    if timeout != "auto":
        return timeout
    return 10 * statistics.median(seconds) + 60 if len(seconds) >= STEPS_OF_HISTORY else SECONDS_OF_FIRST_STEPS


@dataclass
class Part:
    """A part of the work whose amount is known. unit: a plural, such as answers."""

    unit: str
    total: int
    done: int = 0
    began: float = field(default_factory=time.monotonic)

    def seconds_left(self) -> float | None:
        """Estimate the rest from the mean pace so far; None before anything is done."""
        if not self.done:
            return None
        return (time.monotonic() - self.began) * (self.total - self.done) / self.done


@dataclass
class Progress:
    """The counters of one process."""

    phase: str = "load"
    beats: int = 0
    saved_blocks: int = 0
    """Beats of the thread that writes a checkpoint. They count only where the main thread waits for it."""
    timeout: HangTimeout = "auto"
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=101))
    part: Part | None = None
    """The part that is being done, for the lines that say how far it is."""
    is_over: bool = False
    """True where the watchdog ends this process: the main thread stops where it would say that it has done
    something."""
    entered: Callable[[], object] = lambda: None
    """Called on the main thread when a phase or a step ends, and when a phase begins."""

    def position(self) -> tuple[str, int, int]:
        """Return a value that differs wherever there was progress."""
        return self.phase, self.beats, self.saved_blocks if self.phase == "save" else 0

    def limit(self) -> float:
        """Seconds that the current phase may be without a beat."""
        if self.timeout == "never":
            return float("inf")
        if self.phase in SECONDS_WITHOUT_A_BEAT:
            return SECONDS_WITHOUT_A_BEAT[self.phase]
        return step_limit(self.timeout, list(self.step_seconds))

    def begin_run(self, timeout: HangTimeout) -> None:
        """Forget the run before."""
        self.phase, self.timeout, self.is_over, self.part = "load", timeout, False, None
        self.step_seconds.clear()


PROGRESS = Progress()
"""Those of this process."""


def beat() -> None:
    """Say that something was done."""
    PROGRESS.beats += 1
    while PROGRESS.is_over:
        time.sleep(1.0)


def block_saved() -> None:
    """Say that the thread that writes a checkpoint has written something."""
    PROGRESS.saved_blocks += 1


def step_took(seconds: float) -> None:
    """Say how long a training step took."""
    PROGRESS.step_seconds.append(seconds)
    beat()
    PROGRESS.entered()


@contextlib.contextmanager
def counted(unit: str, total: int) -> Iterator[Callable[[int], None]]:
    """Count what the `with` block does of a known amount; it calls what it gets with the number of units just done.

    Inside of another count nothing is counted: the outer one says how far the work is.
    """
    if PROGRESS.part is not None or total == 0:
        yield lambda count: None
        return
    part = PROGRESS.part = Part(unit, total)

    def add(count: int) -> None:
        part.done += count

    try:
        yield add
    finally:
        PROGRESS.part = None


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Name what the `with` block does. Phases may lie inside of others."""
    assert name == STEP or name in SECONDS_WITHOUT_A_BEAT, name
    before = PROGRESS.phase
    _enter(name)
    try:
        yield
    finally:
        _enter(before)


def _enter(name: str) -> None:
    PROGRESS.phase = name
    beat()
    PROGRESS.entered()
