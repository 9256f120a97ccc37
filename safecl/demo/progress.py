"""One progress bar over the whole demonstration. Ranks report by lines of JSON in a file, and the parent draws the bar.
Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

MATERIALS, MEASURE, START, TRAIN = 5.0, 2.0, 2.0, 6.0
"""Lengths of the bar's parts: about their seconds on two idle cores."""
ALIGN = "align"


class Reporter:
    """Writes rank 0's reports of one run into the file; `run` is the run's name."""

    def __init__(self, path: Path, run: str):
        self.path, self.run = path, run

    def step(self, done: int, num_steps: int) -> None:
        self._write(step=done, num_steps=num_steps)

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
    """Draws the bar on a terminal, and elsewhere prints a line for each measurement. `titles`: the bar's text for each
    run, in order."""

    def __init__(self, path: Path, titles: dict[str, str], console: Console):
        path.unlink(missing_ok=True)
        self.path, self.titles, self.console = path, titles, console
        self._read, self._parts, self._seen = 0, 0.0, dict.fromkeys(titles, 0.0)
        total = MATERIALS + sum(_whole(name) for name in titles)
        columns = TextColumn("{task.description:<42}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("data, tokenizer and a random model", total=total)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def materials_written(self) -> None:
        self._parts = MATERIALS
        self._bar.update(self._task, completed=self._parts, description="starting two ranks")

    def watch(self) -> None:
        """Read new reports and update the bar."""
        for event in self._events():
            name = event["run"]
            if "note" in event:
                self._print(name, event["note"])
                continue
            self._seen[name] = max(self._seen[name], self._part(event, self._seen[name]))
            completed = self._parts + sum(self._seen.values())
            self._bar.update(self._task, completed=completed, description=self._description(event))
            if "measured" in event:
                self._print(name, event["measured"])

    def _print(self, name: str, message: str) -> None:
        """Print a line where there is no bar."""
        if not self.console.is_terminal:
            self.console.print(f"{self.titles[name]}: {message}", markup=False)

    def _events(self) -> Sequence[dict[str, Any]]:
        if not self.path.exists():
            return []
        with self.path.open(encoding="utf-8") as file:
            file.seek(self._read)
            lines = [line for line in iter(file.readline, "") if line.endswith("\n")]
        self._read += sum(len(line.encode()) for line in lines)
        return [json.loads(line) for line in lines]

    def _part(self, event: dict[str, Any], before: float) -> float:
        name, scale = event["run"], _scale(event["run"])
        if "finished" in event:
            return _whole(name)
        if "step" in event:
            return scale * (START + MEASURE + TRAIN * event["step"] / event["num_steps"])
        return min(before + scale * MEASURE, _whole(name))

    def _description(self, event: dict[str, Any]) -> str:
        title = self.titles[event["run"]]
        if "step" in event and event["step"] < event["num_steps"]:
            return f"{title}: step {event['step']} of {event['num_steps']}"
        return f"{title}: done" if "finished" in event else f"{title}: measuring"


def _scale(name: str) -> float:
    return 3.0 if name == ALIGN else 1.0


def _whole(name: str) -> float:
    return _scale(name) * (START + 2 * MEASURE + TRAIN)
