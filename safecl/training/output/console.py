"""Prints the plan of a run, its steps and its results. Rank 0 only.

On a terminal the steps are a progress bar. Elsewhere each line begins with the time, a line comes every `log.every`
steps and at least every minute, and the steps' lines say about how long the task still takes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from safecl.data import describe
from safecl.distributed import progress
from safecl.distributed.verbosity import verbosity
from safecl.engine.checkpoint.report import SaveReport
from safecl.evaluation import Evaluation, GateResult, results_table
from safecl.launching.status import duration
from safecl.planning.describe import describe_plan
from safecl.planning.plans import RunPlan
from safecl.terminal import Terminal, fact, plain
from safecl.training.output.heartbeat import Heartbeat, how_far

BAR_WIDTH = 20


class Console:
    """Prints for rank 0 and is silent on other ranks."""

    def __init__(self, every: int, rank: int, terminal: Terminal | None = None):
        self.every = 1 if verbosity.verbose else every
        self.quiet = rank != 0
        self.terminal = terminal or Terminal()
        self._bar: Progress | None = None
        self._steps: StepLines | None = None
        self._heartbeat = Heartbeat(self._print, self._position)
        self._lines = not self.quiet and not self.terminal.is_terminal

    def __enter__(self) -> Console:
        self._heartbeat = Heartbeat(self._print, self._position)
        if self._lines and not verbosity.quiet:
            self._heartbeat.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar = None
        self._heartbeat.stop()

    def fact(self, what: str, value: str) -> None:
        if not self.quiet and not verbosity.quiet:
            self.terminal.print(plain(self._now()).append_text(fact(what, f" {value}")))
            self._heartbeat.said()

    def note(self, message: str) -> None:
        """Print a line, which `--quiet` leaves out."""
        if not self.quiet and not verbosity.quiet:
            self._print(message)

    def warn(self, message: str) -> None:
        """Print a line that `--quiet` keeps."""
        if not self.quiet:
            self._print(message)

    def _print(self, message: str) -> None:
        self.terminal.print(f"{self._now()}{message}")
        self._heartbeat.said()

    def _now(self) -> str:
        return time.strftime("%H:%M:%S ") if self._lines else ""

    def _position(self) -> str:
        """Say where the run is, for the heartbeat."""
        where = f"{self._steps.position()}, " if self._steps is not None else ""
        return f"{where}still in phase {progress.PROGRESS.phase}{how_far()}"

    def plan(self, plan: RunPlan) -> None:
        """Print the plan, and an example of each task's rows."""
        if self.quiet or verbosity.quiet:
            return
        for what, value in describe_plan(plan):
            self.fact(what, value)
        examples = plan.config.privacy.examples
        for task in plan.tasks:
            example = describe(task.dataset, plan.tokenizer, examples=examples, title=f"task {task.config.name}")
            self.terminal.print(example, soft_wrap=False)
        for note in plan.notes:
            self.note(note)

    def measured(self, evaluation: Evaluation) -> None:
        self.note(evaluation.one_line())
        for warning in evaluation.warnings:
            self.warn(f"warning: {warning}")

    def saved(self, report: SaveReport) -> None:
        self.note(str(report))

    @contextmanager
    def progress(self, name: str, num_steps: int, done: int = 0) -> Iterator[StepLines]:
        """Show a bar on a terminal, a line every `every` steps elsewhere. done: steps that were made before."""
        if self.quiet or verbosity.quiet or not self.terminal.is_terminal:
            self._steps = StepLines(self, name, num_steps, done)
            yield self._steps
            self._steps = None
            return
        # On a narrow terminal the losses are cut, not the count and the time.
        rest = Column(no_wrap=True, overflow="ellipsis", ratio=1)
        name_column = TextColumn("{task.description}", markup=False)
        state_column = TextColumn("{task.fields[state]}", markup=False, table_column=rest)
        columns = name_column, BarColumn(bar_width=BAR_WIDTH), MofNCompleteColumn(), TimeRemainingColumn(), state_column
        with Progress(*columns, console=self.terminal, expand=True) as self._bar:
            task = self._bar.add_task(name, total=num_steps, completed=done, state="")
            yield StepLines(self, name, num_steps, done, (self._bar, task))
        self._bar = None

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Show a spinner on a terminal while something takes long, unless a bar is shown."""
        if self.quiet or verbosity.quiet or self._bar is not None or not self.terminal.is_terminal:
            if verbosity.verbose:
                self.note(what)
            yield
            return
        with self.terminal.status(what):
            yield

    def results(self, evaluations: list[Evaluation], gate: GateResult | None, folder: Path) -> None:
        """Print the table of everything measured, and the folder."""
        if self.quiet:
            return
        if evaluations and not verbosity.quiet:
            self.terminal.print(results_table(evaluations))
        if gate is not None:
            self.terminal.print(gate.message)
        self.terminal.print(f"results in {folder}")


class StepLines:
    """Shows a task's steps as they are made: on the bar, or without one as lines."""

    def __init__(
        self, console: Console, name: str, num_steps: int, done: int, bar: tuple[Progress, TaskID] | None = None
    ):
        self._console, self._name, self._num_steps, self._done, self._bar = console, name, num_steps, done, bar
        self._began, self._done_before = time.monotonic(), done

    def step(self, values: dict[str, Any]) -> None:
        """values: see safecl.training.output.metrics_log.step_values."""
        self._done += 1
        if self._bar is not None:
            bar, task = self._bar
            bar.update(task, advance=1, state=_short(values))
        elif self._done % self._console.every == 0 or self._done in (1, self._num_steps):
            self._console.note(f"{self._name} {self._done}/{self._num_steps}  {_short(values)}{self._time_left()}")

    def position(self) -> str:
        """Say how far the task is."""
        return f"{self._name} {self._done}/{self._num_steps}{self._time_left()}"

    def _time_left(self) -> str:
        """Estimate the rest of the task from the mean time of the steps so far, measurements between them included."""
        made, left = self._done - self._done_before, self._num_steps - self._done
        if not made or not left:
            return ""
        return f"  about {duration((time.monotonic() - self._began) / made * left)} left"


def _short(values: dict[str, Any]) -> str:
    losses = "  ".join(
        f"{key.removeprefix('loss/')} {value:.4f}" for key, value in values.items() if key.startswith("loss/")
    )
    norm = f"{values['grad_norm']:.3g}" if values["grad_norm"] is not None else "not finite"
    skipped = f"  skipped {values['skipped_steps']}" if values["skipped_steps"] else ""
    memory = f"{values['memory_bytes'] / 2**30:.2f} GiB"
    speed = f"{values['tokens_per_second']:,.0f} tok/s"
    return f"{losses}  norm {norm}  lr {values['learning_rate']:.2e}  {speed}  {memory}{skipped}"
