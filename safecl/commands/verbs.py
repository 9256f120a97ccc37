"""The decorator that makes a function a verb of the command line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import typer

from safecl.exits import endings_as_exit_codes
from safecl.storage.limits import check_limits

EPILOG = (
    "Exit codes: 0 done, 1 failed while running, 2 wrong config or usage, 3 safety gate failed or undecided, "
    "75 stopped by a signal."
)

Verb = TypeVar("Verb", bound=Callable[..., Any])


def verbs_of(app: typer.Typer, group: str = "", more: str = "") -> Callable[[Verb], Verb]:
    """Return a decorator that makes a function a verb of `app` with the function's name. Its errors become messages and
    exit codes. `more` stands at the end of its help."""

    def verb(function: Verb) -> Verb:
        name = function.__name__.rstrip("_")

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with endings_as_exit_codes(f"{group} {name}".strip()):
                check_limits()
                return function(*args, **kwargs)

        app.command(name, epilog=f"{more}\n\n{EPILOG}" if more else EPILOG)(run)
        return function

    return verb
