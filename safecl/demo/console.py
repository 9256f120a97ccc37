"""The console of one arm, which reports to the demonstration's progress bar."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safecl.demo.progress import Reporter
from safecl.distributed import environment
from safecl.training.output.console import Console, StepLines

if TYPE_CHECKING:
    from safecl.engine.checkpoint.report import SaveReport
    from safecl.evaluation.results.moment import Evaluation
    from safecl.planning.plans import RunPlan


class ArmConsole(Console):
    """Reports steps and measurements to the one bar, and prints nothing else: the demonstration prints one table for
    all arms."""

    def __init__(self, reporter: Reporter):
        super().__init__(every=1, rank=environment.rank())
        self.reporter = reporter

    def __enter__(self) -> ArmConsole:
        return self  # without the line that says each minute where a run is: the bar has its own

    def fact(self, what: str, value: str) -> None:
        pass

    def note(self, message: str) -> None:
        if not self.quiet:
            self.reporter.note(message)

    def plan(self, plan: RunPlan) -> None:
        for note in plan.notes:
            self.note(note)

    def measured(self, evaluation: Evaluation) -> None:
        if not self.quiet:
            self.reporter.measured(evaluation.one_line())

    def saved(self, report: SaveReport) -> None:
        if report.problem is not None and not self.quiet:
            print(report, file=sys.stderr)

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        yield

    def results(self, evaluations: Sequence[Evaluation], gate: object, folder: Path) -> None:
        pass

    @contextmanager
    def progress(self, name: str, num_steps: int, done: int = 0) -> Iterator[StepLines]:
        if done and not self.quiet:
            self.reporter.resumed(done, num_steps)
        yield ArmSteps(None if self.quiet else self.reporter, num_steps, done)


class ArmSteps(StepLines):
    """Counts steps for the bar."""

    def __init__(self, reporter: Reporter | None, num_steps: int, done: int):
        self.reporter, self.num_steps, self.done = reporter, num_steps, done

    def step(self, values: dict[str, Any]) -> None:
        self.done += 1
        if self.reporter is not None:
            self.reporter.step(self.done, self.num_steps)
