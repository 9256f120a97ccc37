"""Reads back the JSON files and JSON lines that safecl wrote into a folder. Imports no torch.

A folder of a run may come from a stranger. A file that is no plain file, leads out of its folder, is too large or
nested too deep, or is not of the form that safecl writes, is refused by name.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from safecl.config import ConfigError
from safecl.config.texts import visible
from safecl.storage.untrusted import json_of, refuse_outside

LARGEST_RECORD = 2**28
"""Largest file of records in bytes: 500,000 steps of a run, or 100,000 answers."""

OPEN = ConfigDict(extra="allow")
"""The config of a form: keys that it does not name are kept as they are."""
Count = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[float, Field(allow_inf_nan=True)]

T = TypeVar("T")
_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}


def read_record(path: Path, form: type[T]) -> T | None:
    """Read a JSON file of a form, a TypedDict; None where there is none. Raises ConfigError."""
    content = _content(path)
    return None if content is None else _checked(json_of(content, path), form, str(path))


def read_lines(path: Path, form: type[T]) -> list[T]:
    """Read JSON lines of a form; empty where there is no file. Raises ConfigError.

    A last line without an end may still be under way, and is left out where it is not JSON.
    """
    content = _content(path)
    if content is None:
        return []
    whole, _, rest = content.rpartition(b"\n")
    found = [
        _checked(json_of(line, f"{path}, line {number}"), form, f"{path}, line {number}")
        for number, line in enumerate(whole.split(b"\n"), 1)
        if line.strip()
    ]
    try:
        last = json_of(rest, path) if rest.strip() else None
    except ConfigError:
        last = None
    return found if last is None else [*found, _checked(last, form, f"{path}, last line")]


def read_text(path: Path) -> str | None:
    """Read a small file of text; None where there is none. Raises ConfigError."""
    content = _content(path)
    return None if content is None else content.decode("utf-8", "replace")


def _content(path: Path) -> bytes | None:
    refuse_outside(path.parent, path)
    try:
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe must not wait for a writer
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    with open(opened, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{path}: not a plain file")
        if found.st_size > LARGEST_RECORD:
            raise ConfigError(f"{path}: {found.st_size:,} bytes long, {LARGEST_RECORD:,} at most are read")
        return file.read()


def _checked(value: Any, form: type[T], where: str) -> T:
    try:
        checked: T = _adapter(form).validate_python(value)
        return checked
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{where}: {visible(key) + ': ' if key else ''}{visible(first['msg'])}; safecl did not write it so"
        ) from None


def _adapter(form: Any) -> TypeAdapter[Any]:
    if form not in _ADAPTERS:
        _ADAPTERS[form] = TypeAdapter(form)
    return _ADAPTERS[form]
