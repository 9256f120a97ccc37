"""Prints the plan of a run, its steps (a progress bar on a terminal, lines elsewhere) and its results. Rank 0 only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from safecl.data import describe
from safecl.engine.checkpoint.report import SaveReport
from safecl.evaluation import Evaluation, GateResult, results_table
from safecl.planning.describe import describe_plan
from safecl.planning.plans import RunPlan

BAR_WIDTH = 20


class Console:
    """Prints for rank 0 and is silent on other ranks."""

    def __init__(self, every: int, rank: int, terminal: Terminal | None = None):
        self.every = every
        self.quiet = rank != 0
        self.terminal = terminal or Terminal(soft_wrap=True, highlight=False)
        self._bar: Progress | None = None

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar = None

    def fact(self, what: str, value: str) -> None:
        if not self.quiet:
            self.terminal.print(f"[bold]{what:<14}[/bold] {value}")

    def note(self, message: str) -> None:
        if not self.quiet:
            self.terminal.print(message, markup=False)

    def plan(self, plan: RunPlan) -> None:
        """Print the plan, and an example of each task's rows."""
        if self.quiet:
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
            self.note(f"warning: {warning}")

    def saved(self, report: SaveReport) -> None:
        self.note(str(report))

    @contextmanager
    def progress(self, name: str, num_steps: int, done: int = 0) -> Iterator[StepLines]:
        """Show a bar on a terminal, a line every `every` steps elsewhere. done: steps that were made before."""
        if self.quiet or not self.terminal.is_terminal:
            yield StepLines(self, name, num_steps, done)
            return
        # On a narrow terminal the losses are cut, not the count and the time.
        rest = Column(no_wrap=True, overflow="ellipsis", ratio=1)
        name_column = TextColumn("{task.description}")
        state_column = TextColumn("{task.fields[state]}", table_column=rest)
        columns = name_column, BarColumn(bar_width=BAR_WIDTH), MofNCompleteColumn(), TimeRemainingColumn(), state_column
        with Progress(*columns, console=self.terminal, expand=True) as self._bar:
            task = self._bar.add_task(name, total=num_steps, completed=done, state="")
            yield StepLines(self, name, num_steps, done, (self._bar, task))
        self._bar = None

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Show a spinner on a terminal while something takes long, unless a bar is shown."""
        if self.quiet or self._bar is not None or not self.terminal.is_terminal:
            yield
            return
        with self.terminal.status(what):
            yield

    def results(self, evaluations: list[Evaluation], gate: GateResult | None, folder: Path) -> None:
        """Print the table of everything measured, and the folder."""
        if self.quiet:
            return
        if evaluations:
            self.terminal.print(results_table(evaluations))
        if gate is not None:
            self.terminal.print(gate.message, markup=False)
        self.terminal.print(f"results in {folder}", markup=False)


class StepLines:
    """Shows a task's steps as they are made: on the bar, or without one as lines."""

    def __init__(
        self, console: Console, name: str, num_steps: int, done: int, bar: tuple[Progress, TaskID] | None = None
    ):
        self._console, self._name, self._num_steps, self._done, self._bar = console, name, num_steps, done, bar

    def step(self, values: dict[str, Any]) -> None:
        """values: see safecl.training.metrics_log.step_values."""
        self._done += 1
        if self._bar is not None:
            bar, task = self._bar
            bar.update(task, advance=1, state=_short(values))
        elif self._done % self._console.every == 0 or self._done in (1, self._num_steps):
            self._console.note(f"{self._name} {self._done}/{self._num_steps}  {_short(values)}")


def _short(values: dict[str, Any]) -> str:
    losses = "  ".join(
        f"{key.removeprefix('loss/')} {value:.4f}" for key, value in values.items() if key.startswith("loss/")
    )
    norm = f"{values['grad_norm']:.3g}" if values["grad_norm"] is not None else "not finite"
    skipped = f"  skipped {values['skipped_steps']}" if values["skipped_steps"] else ""
    memory = f"{values['memory_bytes'] / 2**30:.2f} GiB"
    speed = f"{values['tokens_per_second']:,.0f} tok/s"
    return f"{losses}  norm {norm}  lr {values['learning_rate']:.2e}  {speed}  {memory}{skipped}"
