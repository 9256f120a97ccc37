"""Says where a run is when it has said nothing for a minute, as a log needs it that nobody can look behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from safecl.distributed.progress import PROGRESS
from safecl.launching.status import duration

SECONDS = 55.0
"""A line comes at least every minute: after this time, found within a second or two."""


def how_far() -> str:
    """Say how far the part is that is being done, and about how long it still takes; empty where no amount is known."""
    part = PROGRESS.part
    if part is None:
        return ""
    left = part.seconds_left()
    time_left = "" if left is None else f", about {duration(left)} left"
    return f": {part.done:,} of {part.total:,} {part.unit}{time_left}"


class Heartbeat:
    """A thread that calls `say` with what `position` returns, whenever nothing was said for `seconds`.

    Every line that is printed calls `said`. The thread ends with `stop`.
    """

    def __init__(self, say: Callable[[str], None], position: Callable[[], str], seconds: float = SECONDS):
        self._say, self._position, self._seconds = say, position, seconds
        self._last = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="safecl-heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def said(self) -> None:
        """Note that a line was printed now."""
        self._last = time.monotonic()

    def stop(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._last >= self._seconds:
                self._say(self._position())
                self.said()
