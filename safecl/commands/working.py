"""A sign of life while a verb works and has nothing to print yet."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from safecl.distributed import environment
from safecl.exits import stderr


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner of rank 0 on a terminal; on stderr, so that what is piped on stays clean."""
    if environment.rank() != 0 or not stderr.is_terminal:
        yield
        return
    with stderr.status(what):
        yield
