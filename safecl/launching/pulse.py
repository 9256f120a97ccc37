"""Signs of life that the agents of a job leave for each other in the run folder, which all nodes see.

Each agent touches a file of its own every 5 seconds. Where the file of another agent has not been touched for 20
seconds, or says that its ranks failed 10 seconds ago, the ranks of this node may hang in calls that nobody answers.
Ages are differences of two times of the file server, so the clocks of the nodes do not matter. An agent that has been
asleep itself judges nobody before the others have had time to give a sign. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = "agents"
SECONDS_BETWEEN_BEATS = 5.0
SECONDS_TO_BE_LOST = 20.0
SECONDS_AFTER_A_FAILURE = 10.0
"""Time in which ranks may fail by themselves when those of another node have failed."""
SECONDS_ASLEEP = 15.0
"""An agent that has not looked for this long was stopped, or its machine was."""
_ALIVE, _FAILED = "alive", "failed"


@dataclass
class Pulse:
    """The sign of life of one agent. folder: for the files of all agents of the job; None for a job of one node."""

    folder: Path | None
    name: str = field(default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}")
    _beaten_at: float = field(default_factory=lambda: time.monotonic() - SECONDS_BETWEEN_BEATS)
    _seen: dict[str, float] = field(default_factory=dict)
    """The last sign of each other agent that has given one since this one began, by the file server's clock."""
    _before: dict[str, float] = field(default_factory=dict)

    def begin(self) -> None:
        """Remember the signs that are there already: those of agents that are gone do not change any more."""
        self._beaten_at, self._seen = time.monotonic() - SECONDS_BETWEEN_BEATS, {}
        self._before = self._signs()

    def lost(self) -> str | None:
        """Give a sign, at most every 5 seconds; return why another agent is lost, None where none is."""
        if self.folder is None or time.monotonic() - self._beaten_at < SECONDS_BETWEEN_BEATS:
            return None
        now, before = time.monotonic(), self._beaten_at
        self._beaten_at = now
        with contextlib.suppress(OSError):  # preflight reports a run folder that cannot be written
            own = self._write(_ALIVE)
            return None if now - before > SECONDS_ASLEEP else self._judge(own)
        return None

    def _judge(self, own: float) -> str | None:
        signs = self._signs()
        for name, last in signs.items():
            if last != self._before.get(name):
                self._seen[name] = last
        for name, last in self._seen.items():
            if name not in signs or own - last <= SECONDS_AFTER_A_FAILURE:
                continue
            if self._text(name) == _FAILED:
                return f"the ranks of the agent {name} failed {own - last:.0f} s ago"
            if own - last > SECONDS_TO_BE_LOST:
                return f"the agent {name} gives no sign of life since {own - last:.0f} s"
        return None

    def end(self, failed: bool) -> None:
        """Remove the sign of an agent whose ranks are done; leave one that says that they have failed."""
        if self.folder is None:
            return
        with contextlib.suppress(OSError):
            if failed:
                self._write(_FAILED)
            else:
                (self.folder / self.name).unlink()

    def _write(self, text: str) -> float:
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / self.name).write_text(text)
        return (self.folder / self.name).stat().st_mtime

    def _signs(self) -> dict[str, float]:
        """The time of the last sign of every other agent."""
        found = {}
        for path in self.folder.glob("*") if self.folder is not None else ():
            with contextlib.suppress(OSError):
                if path.name != self.name:
                    found[path.name] = path.stat().st_mtime
        return found

    def _text(self, name: str) -> str:
        assert self.folder is not None
        with contextlib.suppress(OSError):
            return (self.folder / name).read_text()
        return ""
