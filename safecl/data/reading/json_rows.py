"""Rows of JSON files: one object per line, one list of them, or objects over several lines, one after the other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safecl.data.messages import MAX_ROW_CHARS, DataError, clip, columns_of
from safecl.data.reading.formats import detect
from safecl.data.reading.raw import RawRow, lines_of, open_bytes, suffix_of

_BLOCK = 2**20


class _RepeatedKey(dict[str, Any]):
    """A JSON object that has the key `key` more than once."""

    key = ""


def _mark_repeated_key(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(columns := dict(pairs)) == len(pairs):
        return columns
    names = [name for name, _ in pairs]
    marked = _RepeatedKey(columns)
    marked.key = next(name for name in names if names.count(name) > 1)
    return marked


def _repeated_key(value: Any) -> str | None:
    """A key that some object in a parsed value has more than once, or None."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, _RepeatedKey):
            return value.key
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        waiting += [item for item in inner if isinstance(item, (dict, list))]
    return None


def _parse(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_mark_repeated_key)


def _parse_row(line: int, raw: bytes) -> RawRow:
    try:
        columns = _parse(raw.decode("utf-8"))
    except json.JSONDecodeError as error:
        unfinished = raw[:1] == b"{" and error.pos >= len(error.doc.rstrip())
        fix = "; the object does not end on this line, write one per line, e.g. `jq -c .`" if unfinished else ""
        return RawRow(line, None, f"not valid JSON: {error.msg} at column {error.colno}{fix}")
    except UnicodeDecodeError as error:
        return RawRow(line, None, f"not valid UTF-8 at byte {error.start + 1}")
    except RecursionError:
        return RawRow(line, None, "not usable JSON: nested too deeply")
    except ValueError as error:
        return RawRow(line, None, f"not usable JSON: {clip(str(error), 80)}")
    return _as_columns(line, columns)


def _as_columns(line: int, value: Any) -> RawRow:
    if not isinstance(value, dict):
        return RawRow(line, None, f"a row must be a JSON object like {{...}}, not {clip(json.dumps(value)[:100], 24)}")
    if (key := _repeated_key(value)) is not None:
        return RawRow(line, None, f"not usable JSON: the key `{clip(key)}` appears twice")
    return RawRow(line, value) if value else RawRow(line, None, "the row is empty")


def jsonl_rows(path: str, local: Path) -> Iterator[RawRow]:
    with open_bytes(path, local) as file:
        for line, raw in lines_of(file):
            if raw is None or len(raw) > MAX_ROW_CHARS:
                yield RawRow(line, None, f"the line is enormous (over {MAX_ROW_CHARS // 2**20} MiB)")
            else:
                yield _parse_row(line, raw)


def holds_one_value(local: Path) -> bool:
    """Whether the file is one JSON value (`[{...}, ...]` or `{"data": [...]}`) and not one per line.

    The content decides, since suffixes are often wrong.
    """
    with open_bytes(str(local), local) as file:
        start = file.read(_BLOCK).removeprefix(b"\xef\xbb\xbf").lstrip()
    first, _, rest = start.partition(b"\n")
    if re.match(rb'\{\s*\n\s*"', start):  # objects over several lines
        return True
    try:
        _parse(first.decode("utf-8"))
        return not rest.strip() and (start[:1] == b"[" or suffix_of(local) == ".json")
    except (ValueError, RecursionError):
        if _ends_on_a_later_line(start):
            return True
        opens_list = re.match(rb"\[\s*[{\]]", start) or start.strip() == b"["
        return bool(opens_list) or suffix_of(local) == ".json"


def _ends_on_a_later_line(start: bytes) -> bool:
    """Whether a file starts with a JSON object over several lines."""
    text = start.decode("utf-8", errors="replace")
    try:
        return text.startswith("{") and "\n" in text[: json.JSONDecoder().raw_decode(text)[1]]
    except (ValueError, RecursionError):
        return False


def _parse_all(text: str) -> Any:
    """Parse one JSON value, or several objects one after the other, as `jq .` writes them."""
    try:
        return _parse(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data" or not text.lstrip().startswith("{"):
            raise
    decoder, rows, place = json.JSONDecoder(object_pairs_hook=_mark_repeated_key), [], 0
    while place < len(text.rstrip()):
        row, place = decoder.raw_decode(text, len(text) - len(text[place:].lstrip()))
        rows.append(row)
    return rows


def json_rows(path: str, local: Path) -> Iterator[RawRow]:
    try:
        with open_bytes(path, local) as file:
            text = file.read().decode("utf-8-sig")
        value = _parse_all(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not valid UTF-8 at byte {error.start + 1}") from None
    except RecursionError:
        raise DataError(f"{path}: not usable JSON: nested too deeply") from None
    except ValueError as error:
        raise DataError(f"{path}: not usable JSON: {clip(str(error), 80)}") from None
    for number, row in enumerate(_list_of_rows(path, value), 1):
        yield _as_columns(number, row)


def _list_of_rows(path: str, value: Any) -> list[Any]:
    if isinstance(value, dict):
        lists = {name: v for name, v in value.items() if isinstance(v, list) and v and isinstance(v[0], dict)}
        is_row = any(isinstance(value.get(name), list) for name in ("messages", "conversations"))
        if problem := None if is_row else _no_row(value, list(lists)):
            raise DataError(f"{path}: {problem}")
        value = [value] if is_row or len(lists) != 1 else next(iter(lists.values()))
    if not isinstance(value, list):
        raise DataError(f"{path}: must hold a list of rows, [{{...}}, ...]")
    return value


_RECORDS = "write rows, [{...}, ...], e.g. with pandas `to_json(..., orient='records')`"


def _no_row(value: dict[str, Any], lists: list[str]) -> str | None:
    """The reason why an object is neither a row nor has one list of rows; None where it may be a row."""
    if len(lists) > 1 and not detect(value):
        return f"holds several lists of rows, {columns_of(lists)}; write each into a file of its own"
    if {"columns", "data"} <= set(value):
        return f"holds a table in parts, {columns_of(value)}; {_RECORDS}"
    if len(value) > 1 and all(isinstance(item, dict) for item in value.values()):
        return f"holds an object of objects, {columns_of(value)}; {_RECORDS}"
    if len(value) > 1 and all(
        isinstance(item, list) and len(item) > 1 and not isinstance(item[0], dict) for item in value.values()
    ):
        return f"holds columns and not rows, {columns_of(value)}; {_RECORDS}"
    return None
