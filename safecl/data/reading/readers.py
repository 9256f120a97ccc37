"""Reads a row in a named format: the known ones, and templates over the row's own columns for anything else."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from safecl.config import FieldMap
from safecl.data.messages import DataError, Message, RowProblem, check_messages, clip, columns_of, kind_of
from safecl.data.reading.cells import turns_in
from safecl.data.reading.formats import ANSWERS, READERS, column_of, with_tools

_MAX_TAG_CHARS = 80

# ----------------------------------------------------------------------------------------------- templates over columns

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


def template_columns(template: str) -> list[str]:
    """Names of the columns in a template."""
    return [match[1] for match in _PLACEHOLDER.finditer(template) if match[1] is not None]


def _cell(row: Mapping[str, Any], name: str, values: Mapping[str, Mapping[str, str]]) -> str:
    value = column_of(row, name)
    if value is None or isinstance(value, (dict, list)):
        raise RowProblem(f"`{clip(name)}` must be text or a number, not {kind_of(value)}")
    if isinstance(value, str) and _holds_turns(value):
        raise RowProblem(f"`{clip(name)}` holds a list of messages; a template takes text")
    text = str(value).lower() if isinstance(value, bool) else str(value)  # true and false as JSON and YAML write them
    if name not in values:
        return text
    known = values[name]
    if text not in known and isinstance(value, float) and value.is_integer():
        text = str(int(value))
    if text not in known:
        raise RowProblem(f"`{clip(name)}` is {clip(text, 24)!r}; `fields.values` knows {clip(', '.join(known), 60)}")
    return known[text]


def _holds_turns(text: str) -> bool:
    try:
        return turns_in(text) is not None
    except ValueError:
        return True


def fill(template: str, row: Mapping[str, Any], values: Mapping[str, Mapping[str, str]] = {}) -> str:
    """Replace `{column}` by the row's value and `{{`, `}}` by braces. Raises RowProblem where a column is missing."""
    fixed = {"{{": "{", "}}": "}"}
    return _PLACEHOLDER.sub(lambda match: fixed.get(match[0]) or _cell(row, match[1], values), template)


def _from_fields(fields: FieldMap) -> Callable[[Mapping[str, Any]], list[Message]]:
    def messages(row: Mapping[str, Any]) -> list[Message]:
        system = [] if fields.system is None else [Message("system", fill(fields.system, row, fields.values))]
        prompt, completion = fill(fields.prompt, row, fields.values), fill(fields.completion, row, fields.values)
        return [*system, Message("user", prompt), Message("assistant", completion)]

    return messages


def check_fields(fields: FieldMap, columns: Iterable[str], path: str) -> None:
    """Raise DataError where the templates or `values` name a column that is not in `columns`."""
    columns = list(columns)
    templates = {"prompt": fields.prompt, "completion": fields.completion, "system": fields.system or ""}
    named = [(f"fields.{key}", name) for key, template in templates.items() for name in template_columns(template)]
    for key, name in [*named, *(("fields.values", name) for name in fields.values)]:
        if name not in columns:
            near = difflib.get_close_matches(name, columns, n=1)
            hint = f"did you mean `{near[0]}`?" if near else "write {{ and }} for braces that are meant as such"
            raise DataError(
                f"{path}: {key} names the column `{clip(name)}`, the rows have {columns_of(columns)}; {hint}"
            )
    if not template_columns(fields.completion):
        raise DataError(
            f"{path}: fields.completion names no column, so every answer would be the same; "
            f"the rows have {columns_of(columns)}"
        )


# ------------------------------------------------------------------------------------------------------------- choosing


def suggest_fields(columns: Sequence[str]) -> str:
    """Suggest a `fields` line for columns of no known format."""
    # Of a pair of preferences, only the chosen answer is worth learning.
    columns = (
        [c for c in columns if not re.search(r"reject|label|score", c, re.I)] if "chosen" in columns else [*columns]
    )
    answers = [
        c
        for c in columns
        if re.search(r"answer|label|target|output|response|completion|summary|solution|chosen", c, re.I)
    ]
    answer = answers[0] if answers else columns[-1] if columns else "answer"
    asked = next((c for c in columns if c != answer and c not in ("id", "idx", "index", "task_id")), "question")
    return f'fields: {{prompt: "{{{asked}}}", completion: "{{{answer}}}"}}'


def row_reader(format: str, fields: FieldMap | None) -> Callable[[Mapping[str, Any]], tuple[Message, ...]]:
    """Return the function from a row's columns to its checked messages. It raises RowProblem."""
    read = _from_fields(fields) if format == "fields" and fields is not None else READERS[format]
    if format in ("text", "fields"):
        return lambda row: check_messages(read(row))
    return lambda row: with_tools(row, check_messages(read(row)))


def tags_of(row: Mapping[str, Any]) -> dict[str, str]:
    """Short scalar columns other than the text (`id`, `category`, `safe`, ...), as strings."""
    tags = {}
    for name, value in row.items():
        if name in ("text", "prompt", "instruction", "input", "output", "context", "system", *ANSWERS):
            continue
        if isinstance(value, (str, bool, int, float)) and len(str(value)) <= _MAX_TAG_CHARS:
            text = str(value).lower() if isinstance(value, bool) else str(value)
            tags[clip(name)] = clip(text, _MAX_TAG_CHARS)
    return tags
