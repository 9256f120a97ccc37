"""Shows that a verb is working while it has nothing to print yet."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from safecl.distributed import environment
from safecl.distributed.verbosity import verbosity
from safecl.exits import stderr


def announce(verb: str, what: object) -> None:
    """Print a first line on stderr, before torch is loaded, which takes seconds. Rank 0 only; not with `--quiet`."""
    if environment.rank() == 0 and not verbosity.quiet:
        stderr.print(f"safecl {verb}: {what}", style="dim", markup=False)


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Show a spinner on rank 0's terminal; on stderr, so that a pipe gets the results only."""
    if environment.rank() != 0 or not stderr.is_terminal:
        yield
        return
    with stderr.status(what):
        yield
