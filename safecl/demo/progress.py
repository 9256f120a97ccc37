"""One progress bar over the whole demonstration. Ranks report by lines of JSON in a file, and the parent draws the bar.
Imports no torch."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from safecl.terminal import Terminal

ALIGN = "align"
SECONDS_BETWEEN_LINES = 60.0
"""Where there is no bar, a line says at least this often how far it is."""
SHARE_TO_JUDGE_BY = 0.02
"""Share of everything after which the time that is left is estimated."""


class Made(Protocol):
    """Is told which share of the materials is there; earlier: it was there before the demonstration began."""

    def __call__(self, share: float, *, earlier: bool = False) -> None: ...


def not_told(share: float, *, earlier: bool = False) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of the bar's parts: about their seconds on two idle cores."""

    materials: float
    start: float
    measure: float
    train: float
    of_runs: Mapping[str, float] = field(default_factory=dict)
    """Factors of runs that take longer or shorter."""
    unmeasured: frozenset[str] = frozenset()
    """Runs that measure nothing."""

    def measured(self, name: str) -> float:
        """Return the length of one measurement."""
        return 0.0 if name in self.unmeasured else self.of_runs.get(name, 1.0) * self.measure

    def trained(self, name: str, share: float) -> float:
        """Return the length of a run until it has made a share of its steps."""
        return self.measured(name) + self.of_runs.get(name, 1.0) * (self.start + share * self.train)

    def whole(self, name: str) -> float:
        return self.trained(name, 1.0) + self.measured(name)


class Reporter:
    """Writes rank 0's reports of one run into the file; `run` is the run's name."""

    def __init__(self, path: Path, run: str):
        self.path, self.run = path, run

    def step(self, done: int, num_steps: int) -> None:
        self._write(step=done, num_steps=num_steps)

    def resumed(self, done: int, num_steps: int) -> None:
        """Report steps that an earlier process has made."""
        self._write(step=done, num_steps=num_steps, earlier=True)

    def measured(self, line: str) -> None:
        self._write(measured=line)

    def note(self, message: str) -> None:
        self._write(note=message)

    def finished(self) -> None:
        self._write(finished=True)

    def _write(self, **event: object) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"run": self.run, **event}) + "\n")


class Bar:
    """Draws the bar on a terminal, and elsewhere prints a line for each measurement and each minute.

    titles: the bar's text for each run, in order.
    """

    def __init__(self, path: Path, titles: dict[str, str], console: Terminal, lengths: Lengths):
        path.unlink(missing_ok=True)
        self.path, self.titles, self.console, self.lengths = path, titles, console, lengths
        self._read, self._parts, self._seen = 0, 0.0, dict.fromkeys(titles, 0.0)
        self._earlier = 0.0  # of what is done, the part that was there before
        self._total = lengths.materials + sum(map(lengths.whole, titles))
        name = TextColumn("{task.description:<42}", markup=False)
        columns = name, BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
        self._bar = Progress(
            *columns,
            TextColumn("{task.fields[left]}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=self._total, left="")
        self._began = self._printed = time.monotonic()
        self._told = ""

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def say(self, what: str) -> None:
        """Show what is being done before any rank runs."""
        self._show(what)
        if not self.console.is_terminal:
            self.console.print(what)

    def made(self, share: float, *, earlier: bool = False) -> None:
        """Show that this share of the materials is there. See `Made`."""
        before, self._parts = self._parts, max(self._parts, share * self.lengths.materials)
        self._earlier += earlier * (self._parts - before)
        self._show(self._told)
        self._print_each_minute()

    def materials_written(self) -> None:
        self._parts = self.lengths.materials
        self._show("starting")

    def watch(self) -> None:
        """Read new reports and update the bar."""
        self._print_each_minute()
        for event in self._events():
            name = event["run"]
            if "note" in event:
                self._print(name, event["note"])
                continue
            before, self._seen[name] = self._seen[name], max(self._seen[name], self._part(event, self._seen[name]))
            if event.keys() & {"earlier", "finished"}:  # a run that is finished here has reported all of it before
                self._earlier += self._seen[name] - before
            self._show(self._description(event))
            if "measured" in event:
                self._print(name, event["measured"])

    @property
    def _done(self) -> float:
        return self._parts + sum(self._seen.values())

    def _show(self, what: str) -> None:
        self._told = what
        self._bar.update(self._task, completed=self._done, description=what, left=self._left())

    def _left(self) -> str:
        """Return about how long the rest takes at the pace since the start, once that can be told."""
        here = self._done - self._earlier
        if here < SHARE_TO_JUDGE_BY * self._total:
            return ""
        minutes = round((time.monotonic() - self._began) * (self._total - self._done) / here / 60)
        return f"about {minutes} minute{'s' * (minutes > 1)} left" if minutes else "less than a minute left"

    def _print(self, name: str, message: str) -> None:
        """Print a line where there is no bar."""
        if not self.console.is_terminal:
            self.console.print(f"{self.titles[name]}: {message}")
            self._printed = time.monotonic()

    def _print_each_minute(self) -> None:
        now = time.monotonic()
        if self.console.is_terminal or now - self._printed < SECONDS_BETWEEN_LINES:
            return
        left = self._left()
        self.console.print(f"{self._told} ({self._done / self._total:.0%} in all{left and f', {left}'})")
        self._printed = now

    def _events(self) -> Sequence[dict[str, Any]]:
        if not self.path.exists():
            return []
        with self.path.open(encoding="utf-8") as file:
            file.seek(self._read)
            lines = [line for line in iter(file.readline, "") if line.endswith("\n")]
        self._read += sum(len(line.encode()) for line in lines)
        return [json.loads(line) for line in lines]

    def _part(self, event: dict[str, Any], before: float) -> float:
        name, lengths = event["run"], self.lengths
        if "finished" in event:
            return lengths.whole(name)
        if "step" in event:
            return lengths.trained(name, event["step"] / event["num_steps"])
        return min(before + lengths.measured(name), lengths.whole(name))

    def _description(self, event: dict[str, Any]) -> str:
        title = self.titles[event["run"]]
        if "step" in event and event["step"] < event["num_steps"]:
            return f"{title}: step {event['step']} of {event['num_steps']}"
        return f"{title}: done" if "finished" in event else f"{title}: measuring"
