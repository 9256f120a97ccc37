"""One rank of the demonstration: alignment, then every arm, in one process group. Started by
safecl/distributed/spawn.py."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from safecl.config import load_config
from safecl.demo.progress import Reporter
from safecl.distributed import environment
from safecl.exits import ExitCode, errors_as_messages, tracebacks

if TYPE_CHECKING:
    from safecl.engine.checkpoint.report import SaveReport


def run_arms(configs: Sequence[Path], events: Path) -> None:
    """Trains every config, one after the other; one that is finished in its folder is passed over, one under way goes
    on."""
    from safecl.training.trainer import Trainer

    for path in configs:
        trainer = Trainer(load_config(path))
        reporter = Reporter(events, path.stem)
        trainer.console = _quiet_console(reporter)
        if trainer.fit().stopped:
            raise SystemExit(ExitCode.STOPPED)
        if environment.rank() == 0:
            reporter.finished()


def _quiet_console(reporter: Reporter):
    """Reports steps and measures for the one bar; the demonstration prints one table for all arms instead of one for
    each."""
    from safecl.training.console import Console

    class ArmConsole(Console):
        def fact(self, what: str, value: str) -> None:
            pass

        def note(self, message: str) -> None:
            if not self.quiet:
                reporter.note(message)

        def show(self, make: object) -> None:
            pass

        def measured(self, evaluation) -> None:
            if not self.quiet:
                reporter.measured(evaluation.one_line())

        def saved(self, report: SaveReport) -> None:
            if report.problem is not None and not self.quiet:
                print(report, file=sys.stderr)

        def working(self, what: str) -> nullcontext:
            return nullcontext()

        def results(self, evaluations: list, gate: object, folder: Path) -> None:
            pass

        @contextmanager
        def progress(self, name: str, num_steps: int, done: int = 0) -> Iterator[_Steps]:
            yield _Steps(None if self.quiet else reporter, num_steps, done)

    return ArmConsole(every=1, rank=environment.rank())


class _Steps:
    """Counts steps for the bar."""

    def __init__(self, reporter: Reporter | None, num_steps: int, done: int):
        self.reporter, self.num_steps, self.done = reporter, num_steps, done

    def step(self, values: dict) -> None:
        self.done += 1
        if self.reporter is not None:
            self.reporter.step(self.done, self.num_steps)


if __name__ == "__main__":
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the parent as well, which speaks of it and ends all ranks
    signal.pthread_sigmask(
        signal.SIG_UNBLOCK, [signal.SIGINT]
    )  # safecl/distributed/spawn.py; a run under way handles it by itself
    events, *configs = (Path(argument) for argument in sys.argv[1:])
    tracebacks.folder = events.parent
    with errors_as_messages("demo"):
        run_arms(configs, events)
