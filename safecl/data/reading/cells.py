"""Values of single cells: lists of messages that CSV and Parquet files hold as text, and empty values."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

_OPENS_TURNS = re.compile(r"\[?\s*\{\s*['\"](role|content|from|value)['\"]\s*:")


def parse_text(text: str) -> Any:
    """Return the value that a text of JSON, or of Python as pandas writes it, stands for. Raises ValueError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        raise ValueError("neither JSON nor Python text") from None


def is_turns(value: Any) -> bool:
    """Whether a value is a list of messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and bool({"role", "from"} & set(value[0]))
    )


def turns_in(value: Any) -> Any:
    """Return the list of messages that a cell holds, as it is or as text; None where the cell holds no messages.

    Raises: ValueError where the text looks like such a list and cannot be read.
    """
    if isinstance(value, str):
        if not _OPENS_TURNS.match(value.strip()):
            return None
        is_list = value.strip().startswith("[")
        try:
            value = parse_text(value)
        except ValueError:
            if is_list and value.strip().endswith("]"):
                raise
            return None
    if isinstance(value, dict) and any(keys <= set(value) for keys in ({"role", "content"}, {"from", "value"})):
        value = [value]
    return value if is_turns(value) else None


def is_nan(value: Any) -> bool:
    """Whether a value is the number NaN, which table libraries write where there is none."""
    return isinstance(value, float) and value != value


def is_empty(value: Any) -> bool:
    """Whether a cell says nothing: null, NaN, blank text, an empty list or object."""
    return value is None or is_nan(value) or (isinstance(value, str) and not value.strip()) or value in ([], {})


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Drop the nulls in the objects of a row's cells. Arrow gives every object of a column the keys of all others."""
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def texts_in(value: Any) -> list[str]:
    """Return all texts in a value, those of lists and objects included."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [text for item in inner for text in texts_in(item)]
