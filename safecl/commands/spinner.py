"""Shows that a verb is working while it has nothing to print yet."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.text import Text

from safecl.distributed import environment
from safecl.distributed.verbosity import verbosity
from safecl.exits import stderr
from safecl.launching.status import duration
from safecl.terminal import plain
from safecl.training.output.heartbeat import SECONDS, Heartbeat, how_far

What = str | Callable[[], str]
"""What a verb is doing: a text, or a function that says it now."""


def announce(verb: str, what: object) -> None:
    """Print a first line on stderr, before torch is loaded, which takes seconds. Rank 0 only; not with `--quiet`."""
    if environment.rank() == 0 and not verbosity.quiet:
        stderr.print(f"safecl {verb}: {what}", style="dim")


@contextlib.contextmanager
def working(what: What) -> Iterator[None]:
    """Show a spinner on rank 0's terminal, and elsewhere a line with the time at least every minute; on stderr, so that
    a pipe gets the results only. Both say how far the work is where its amount is known."""
    if environment.rank() != 0:
        yield
    elif stderr.is_terminal:
        with stderr.status(_Now(what)):
            yield
    else:
        with lines_of(what):
            yield


@dataclass(frozen=True)
class _Now:
    """The text beside a spinner, made anew whenever it is drawn."""

    what: What

    def __rich__(self) -> Text:
        return plain(f"{_text(self.what)}{how_far()}")


def _text(what: What) -> str:
    return what if isinstance(what, str) else what()


@contextlib.contextmanager
def lines_of(what: What) -> Iterator[Callable[[], None]]:
    """Print a line with the time whenever nothing was printed for a minute, unless stderr is a terminal. Gives the
    function that a verb calls when it prints a line of its own. Rank 0 only; not with `--quiet`."""
    if environment.rank() != 0 or stderr.is_terminal or verbosity.quiet:
        yield lambda: None
        return
    began = time.monotonic()

    def say(text: str) -> None:
        stderr.print(f"{time.strftime('%H:%M:%S')} {text}")

    def position() -> str:
        return f"still {_text(what)}, for {duration(time.monotonic() - began)} now{how_far()}"

    heartbeat = Heartbeat(say, position, SECONDS)
    heartbeat.start()
    try:
        yield heartbeat.said
    finally:
        heartbeat.stop()
