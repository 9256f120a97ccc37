"""Shows that a verb is working while it has nothing to print yet."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from safecl.distributed import environment
from safecl.distributed.verbosity import verbosity
from safecl.exits import stderr
from safecl.launching.status import duration
from safecl.training.output.heartbeat import SECONDS, Heartbeat


def announce(verb: str, what: object) -> None:
    """Print a first line on stderr, before torch is loaded, which takes seconds. Rank 0 only; not with `--quiet`."""
    if environment.rank() == 0 and not verbosity.quiet:
        stderr.print(f"safecl {verb}: {what}", style="dim")


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Show a spinner on rank 0's terminal, and elsewhere a line with the time at least every minute; on stderr, so that
    a pipe gets the results only."""
    if environment.rank() != 0:
        yield
    elif stderr.is_terminal:
        with stderr.status(what):
            yield
    elif verbosity.quiet:
        yield
    else:
        with _lines(what):
            yield


@contextlib.contextmanager
def _lines(what: str) -> Iterator[None]:
    began = time.monotonic()

    def say(text: str) -> None:
        stderr.print(f"{time.strftime('%H:%M:%S')} {text}")

    heartbeat = Heartbeat(say, lambda: f"still {what}, for {duration(time.monotonic() - began)} now", SECONDS)
    heartbeat.start()
    try:
        yield
    finally:
        heartbeat.stop()
