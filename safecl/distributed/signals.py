"""Signals that ask a process to end: SIGTERM, Ctrl-C, SIGUSR1, and SIGHUP, which a terminal sends when it closes.
Imports no torch."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SECONDS_BEFORE_A_SECOND_COUNTS = 1.0  # a terminal and a launcher may both pass on one key press


class StopSignals:
    """Calls `first` with a signal's number when it comes, and `again` with those that come more than a second later.

    It handles signals while it is entered, and restores the earlier handlers; a handler that was set meanwhile stays.
    It does nothing outside of the main thread, where Python handles no signals.
    """

    def __init__(self, first: Callable[[int], object], again: Callable[[int], object]):
        self._first, self._again = first, again
        self._came_at: float | None = None
        self._before: dict[int, Any] = {}
        self._terminals: list[int] = []

    def __enter__(self) -> None:
        self._terminals = [handle for handle in (1, 2) if os.isatty(handle)]
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # nohup
        wanted = [number for number in SIGNALS if number != signal.SIGHUP or not ignored]
        self._before = {number: set_handler(number, self._on_signal) for number in wanted}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._before.items():
            if handler is not None and signal.getsignal(number) == self._on_signal:
                set_handler(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._leave_terminal()
        if self._came_at is None:
            self._came_at = time.monotonic()
            self._first(number)
        elif time.monotonic() - self._came_at > SECONDS_BEFORE_A_SECOND_COUNTS:
            self._again(number)

    def _leave_terminal(self) -> None:
        """Write to nowhere instead of to a terminal that is gone, where each write would be an error."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for handle in self._terminals:
            os.dup2(nowhere, handle)
        os.close(nowhere)


class StopRequest:
    """Lets a run finish its step: while it is entered, a signal only sets `name`, the signal's name for people.

    A second Ctrl-C raises KeyboardInterrupt. With `announce` the signal is reported on stderr.
    """

    def __init__(self, announce: bool = True):
        self.name: str | None = None
        self._announce = announce
        self._signals = StopSignals(self._request, self._stop_at_once)

    @property
    def requested(self) -> bool:
        return self.name is not None

    def __enter__(self) -> StopRequest:
        self._signals.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._signals.__exit__(*error)

    def _request(self, number: int) -> None:
        self.name = name_of(number)
        if self._announce:  # os.write: a signal may come in the middle of a print
            again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
            os.write(2, f"\nsafecl: {self.name}: finishing this step and saving{again}\n".encode())

    def _stop_at_once(self, number: int) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt


def name_of(number: int) -> str:
    """A signal's name for people: Ctrl-C, SIGTERM, SIGUSR1, SIGHUP."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def set_handler(number: int, handler: Any) -> Any:
    """Set a signal's handler and return the one before. Outside of the main thread, where that is an error, do
    nothing."""
    with contextlib.suppress(ValueError):
        return signal.signal(number, handler)
    return None
