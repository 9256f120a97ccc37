"""The processes of a job as they see each other: who they are, and how far each has come. Imports no torch."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safecl.distributed import environment


@dataclass(frozen=True)
class Member:
    """One rank: its process, its host, and the address of its memory for stacks (see watchdog.py)."""

    rank: int
    host: str
    process: int
    started: str
    """When the process started, as the kernel counts; with the process's number it is unique until the next boot."""
    stacks: str

    @property
    def is_alive(self) -> bool:
        """Whether its process is there. Ask it only on its own host."""
        return start_of(self.process) == self.started

    @property
    def is_stopped(self) -> bool:
        """Whether its process was stopped by a signal. Ask it only on its own host."""
        return _status(self.process)[0] == "T"

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.process})"


@dataclass(frozen=True)
class Heartbeat:
    """The progress of a rank."""

    phase: str
    age: float
    """Seconds without progress in which the process was awake."""
    limit: float
    collective: str
    """The last collective call, like `all_reduce, number 532`; empty where there was none."""
    number: int
    """Its number in the group of all ranks and all other groups together."""
    waits: bool
    """Whether the process waits in it."""
    ticks: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Heartbeat:
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Verdict:
    """Why a job is ended, and by whose fault."""

    guilty: tuple[int, ...]
    message: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Verdict:
        values: dict[str, Any] = json.loads(text)
        return cls(tuple(values["guilty"]), values["message"])


Hearts = dict[int, Heartbeat | None]
"""The heartbeats of ranks; None for a rank that has shown none."""


def this_member(stacks: str) -> Member:
    """Describe this process."""
    return Member(environment.rank(), socket.gethostname(), os.getpid(), start_of(os.getpid()), stacks)


def start_of(process: int) -> str:
    """Return when a process of this host started; empty where it has ended."""
    return _status(process)[1]


def _status(process: int) -> tuple[str, str]:
    """(state, when it started) of a process of this host; empty where it has ended."""
    try:
        state, *values = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return "", ""
    return ("", "") if state == "Z" else (state, values[18])


def judge(before: Hearts, after: Hearts) -> tuple[int, ...]:
    """Return the ranks that hold up the others.

    before, after: the heartbeats of all ranks, read twice with some beats between. The guilty ranks are those
    whose heart does not beat; else those that are in no collective call while others wait in one; else those whose last
    call has a lower number than that of others; else all.
    """
    silent = tuple(rank for rank, beat in after.items() if beat is None or beat == before[rank])
    if silent:
        return silent
    found = {rank: beat for rank, beat in after.items() if beat is not None}
    busy = tuple(rank for rank, beat in found.items() if not beat.waits)
    if busy and len(busy) < len(found):
        return busy
    last = max(beat.number for beat in found.values())
    return tuple(rank for rank, beat in found.items() if beat.number < last) or tuple(found)


def describe(member: Member, beat: Heartbeat | None, *, silent: bool = False) -> str:
    """Return a sentence about a rank. silent: its heart does not beat."""
    if beat is None or silent:
        sign = f"{member} gives no sign of life (stopped, or stuck in code that keeps Python's lock)"
        last = f"; last seen in the phase {beat.phase}, collective call {beat.collective or 'none'}" if beat else ""
        return sign + last
    place = f"{'waits in' if beat.waits else 'last collective call'} {beat.collective}"
    return f"{member} hangs in the phase {beat.phase}, {place if beat.collective else 'before any collective call'}"
