"""Signals that ask a run to end: the step is finished, everything is saved, and the same command goes on later."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SECONDS_BEFORE_A_SECOND_COUNTS = 1.0  # a terminal and a launcher may both pass on what was pressed once


class StopRequest:
    """While it is entered, the signals only set `name`; a second Ctrl-C after a second raises KeyboardInterrupt.

    Outside of the main thread it handles nothing.
    """

    def __init__(self, announce: bool = True):
        self.name: str | None = None
        self._announce = announce
        self._since = 0.0
        self._before: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self.name is not None

    def __enter__(self) -> StopRequest:
        with contextlib.suppress(ValueError):
            self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.name is None:
            self.name, self._since = (
                "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name,
                time.monotonic(),
            )
            if self._announce:  # os.write: a signal may come in the middle of a print
                again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
                os.write(2, f"\nsafecl: {self.name}: finishing this step and saving{again}\n".encode())
        elif number == signal.SIGINT and time.monotonic() - self._since > SECONDS_BEFORE_A_SECOND_COUNTS:
            raise KeyboardInterrupt
