"""The decorator that makes a function a verb of the command line."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import typer

from safecl.config import ConfigError
from safecl.config.texts import check_text
from safecl.exits import endings_as_exit_codes
from safecl.storage.limits import check_limits

EPILOG = (
    "Exit codes: 0 done, 1 failed while running, 2 wrong config or usage, 3 safety gate not passed or upload refused, "
    "75 stopped by a signal."
)

Verb = TypeVar("Verb", bound=Callable[..., Any])


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise ConfigError for a path or name that no file can have. Overrides are checked with the config."""
    for name, value in arguments.items():
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(text, (str, Path)) or name == "overrides":
                continue
            try:
                check_text(str(text))
            except ValueError as error:
                raise ConfigError(f"{name.rstrip('_')}: {error}") from None


def verbs_of(app: typer.Typer, group: str = "", more: str = "") -> Callable[[Verb], Verb]:
    """Return a decorator that makes a function a verb of `app` with the function's name. Its errors become messages and
    exit codes. `more` stands at the end of its help."""

    def verb(function: Verb) -> Verb:
        name = function.__name__.rstrip("_")

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with endings_as_exit_codes(f"{group} {name}".strip()):
                check_limits()
                _check_arguments(kwargs)
                return function(*args, **kwargs)

        app.command(name, epilog=f"{more}\n\n{EPILOG}" if more else EPILOG)(run)
        return function

    return verb


_OF_EVERY_VERB = ("--traceback", "--quiet", "-v", "--verbose")


def options_first(arguments: list[str]) -> list[str]:
    """Put the options of every verb before the verb. What stands behind `--` is for another program."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    own, others = arguments[:end], arguments[end:]
    found = [argument for argument in own if argument in _OF_EVERY_VERB]
    return [*found, *(argument for argument in own if argument not in _OF_EVERY_VERB), *others]
