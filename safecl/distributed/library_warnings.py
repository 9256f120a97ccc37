"""FutureWarnings of libraries, which tell their own callers of changes and are of no use to a user of safecl."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def hide_future_warnings() -> None:
    """Hide them in this process, unless python's -W or PYTHONWARNINGS asks for warnings."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)


@contextmanager
def no_future_warnings() -> Iterator[None]:
    """Hides them inside the block, for a call by a user's own program, whose filters stay as they are."""
    with warnings.catch_warnings():
        hide_future_warnings()
        yield
