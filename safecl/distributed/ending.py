"""The end of ranks that hang: their stacks are written into a folder, and those that cannot end themselves are killed.

A rank that is stopped, or in C code that keeps Python's lock, answers no Python code. But its signal handlers in C do:
faulthandler writes the stacks of its threads into a file in its memory, which another rank of the host reads, and then
ends the process. So a rank that was stopped does nothing more when it is woken.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from safecl.distributed import recorder
from safecl.distributed.hearts import Member

STACKS = signal.SIGRTMIN + 5
"""A rank that gets it writes its stacks into its memory and ends."""
SECONDS_TO_END = 8.0
"""A rank that is not stopped may end itself in this time."""


def say(message: str) -> None:
    """Print from a thread, whatever the main thread does."""
    os.write(2, f"\nsafecl: {message}\n".encode())


def write_stacks(folder: Path, rank: int, head: str) -> None:
    """Write the stacks and the last collective calls of this process. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _stack_file(rank)).open("w", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {head}\n\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
    (folder / f"collectives-{rank:05d}.json").write_bytes(recorder.flight_records())


def end_members(members: Sequence[Member], folder: Path) -> None:
    """End these ranks of this host."""
    for member in members:
        with contextlib.suppress(OSError):  # it has just ended
            _end_member(member, folder)


def _end_member(member: Member, folder: Path) -> None:
    """Let a rank end itself where it is not stopped; else take its stacks and end it."""
    if not member.is_alive:
        return
    with open(member.stacks, "rb") as stacks:
        if not member.is_stopped and wait_until(lambda: not member.is_alive, SECONDS_TO_END):
            return
        os.kill(member.process, STACKS)  # before it is woken: it must not go on
        os.kill(member.process, signal.SIGCONT)
        if not wait_until(lambda: not member.is_alive, 1.2):
            os.kill(member.process, signal.SIGKILL)
        found = stacks.read()
    if found or not (folder / _stack_file(member.rank)).exists():
        (folder / _stack_file(member.rank)).write_bytes(
            f"{member} did not end by itself and was ended\n\n".encode() + found
        )


def wait_until(holds: Callable[[], bool], seconds: float) -> bool:
    """Ask until it holds or the time is over; return whether it holds."""
    deadline = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return held


def _stack_file(rank: int) -> str:
    return f"stacks-{rank:05d}.txt"
