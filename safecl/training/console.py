"""What a run says: facts at the start, a progress bar on a terminal and plain lines elsewhere, and the results. Rank 0
only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console as Terminal
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

if TYPE_CHECKING:
    from safecl.engine.checkpoint.report import SaveReport
    from safecl.evaluation import Evaluation


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

    def __exit__(self, *error) -> None:
        self._bar = None

    def fact(self, what: str, value: str) -> None:
        if not self.quiet:
            self.terminal.print(f"[bold]{what:<14}[/bold] {value}")

    def note(self, message: str) -> None:
        if not self.quiet:
            self.terminal.print(message, markup=False)

    def show(self, make: Callable[[], RenderableType]) -> None:
        """Prints what `make` gives, which other ranks do not even make."""
        if not self.quiet:
            self.terminal.print(make(), soft_wrap=False)

    def measured(self, evaluation: Evaluation) -> None:
        """What was measured at one moment."""
        self.note(evaluation.one_line())

    def saved(self, report: SaveReport) -> None:
        """How the save of a checkpoint ended."""
        self.note(str(report))

    @contextmanager
    def progress(self, name: str, num_steps: int, done: int = 0) -> Iterator[Steps]:
        """A bar on a terminal, a line every so many steps elsewhere; `done` steps were made before."""
        if self.quiet or not self.terminal.is_terminal:
            yield Steps(None, None, self, name, num_steps, done)
            return
        # Of a narrow terminal the losses get what the count and the time leave, not the other way round.
        rest = Column(no_wrap=True, overflow="ellipsis", ratio=1)
        name_column, state_column = (
            TextColumn("{task.description}"),
            TextColumn("{task.fields[state]}", table_column=rest),
        )
        columns = name_column, BarColumn(bar_width=BAR_WIDTH), MofNCompleteColumn(), TimeRemainingColumn(), state_column
        with Progress(*columns, console=self.terminal, expand=True) as self._bar:
            task = self._bar.add_task(name, total=num_steps, completed=done, state="")
            yield Steps(self._bar, task, self, name, num_steps, done)
        self._bar = None

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """A sign of life on a terminal while something takes long; beside a bar there is none."""
        if self.quiet or self._bar is not None or not self.terminal.is_terminal:
            yield
            return
        with self.terminal.status(what):
            yield

    def results(self, evaluations: list, gate, folder: Path) -> None:
        """The table of everything measured, and where it is."""
        if self.quiet:
            return
        from safecl.evaluation import results_table

        if evaluations:
            self.terminal.print(results_table(evaluations))
        if gate is not None:
            self.terminal.print(gate.message, markup=False)
        self.terminal.print(f"results in {folder}", markup=False)


class Steps:
    """Shows a task's steps as they are made."""

    def __init__(self, bar: Progress | None, task, console: Console, name: str, num_steps: int, done: int):
        self._bar, self._task, self._console, self._name, self._num_steps = bar, task, console, name, num_steps
        self._done = done

    def step(self, values: dict) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._task, advance=1, state=_short(values))
        elif self._done % self._console.every == 0 or self._done in (1, self._num_steps):
            self._console.note(f"{self._name} {self._done}/{self._num_steps}  {_short(values)}")


def _short(values: dict) -> str:
    losses = "  ".join(
        f"{key.removeprefix('loss/')} {value:.4f}" for key, value in values.items() if key.startswith("loss/")
    )
    norm = f"{values['grad_norm']:.3g}" if values["grad_norm"] is not None else "not finite"
    skipped = f"  skipped {values['skipped_steps']}" if values["skipped_steps"] else ""
    memory = f"{values['memory_bytes'] / 2**30:.2f} GiB"
    return f"{losses}  norm {norm}  lr {values['learning_rate']:.2e}  {values['tokens_per_second']:,.0f} tok/s  {memory}{skipped}"
