"""Rows of CSV and TSV files. The header tells the delimiter: semicolons and tabs are common in files called .csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safecl.data.messages import MAX_ROW_CHARS, DataError, clip
from safecl.data.reading.raw import RawRow, open_bytes

_DELIMITERS = (",", ";", "\t", "|")


def csv_rows(path: str, local: Path, delimiter: str) -> Iterator[RawRow]:
    """Read the rows below the header. `delimiter`: the usual one of the suffix, which the header may overrule."""
    csv.field_size_limit(MAX_ROW_CHARS)
    delimiter, skipped = _settle_delimiter(path, local, delimiter)
    with open_bytes(path, local) as file:
        for _ in range(skipped):
            file.readline()
        # Bytes that are not UTF-8 become lone surrogates, which the row's own check reports with its number.
        encoding = "utf-8" if skipped else "utf-8-sig"
        lines = io.TextIOWrapper(file, encoding=encoding, errors="surrogateescape", newline="")
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        names = _csv_header(path, reader)
        while True:
            line = skipped + reader.line_num + 1  # the row's first line: a quoted cell may span several
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if "end of data" in str(error):
                    # The rest of the file is inside the quotes, so the number of lost rows is unknown.
                    raise DataError(f"{path}:{line}: a quote is opened that is never closed") from None
                yield RawRow(line, None, f"not valid CSV: {clip(str(error), 60)}")
                continue
            if cells and len(cells) != len(names):
                yield RawRow(line, None, f"has {len(cells)} cells, the header has {len(names)}")
            elif cells:
                yield RawRow(line, {name: _value(cell) for name, cell in zip(names, cells, strict=True)})


def _value(cell: str) -> str | None:
    return None if cell in ("nan", "NaN") else cell  # as table libraries write an empty cell


def _settle_delimiter(path: str, local: Path, usual: str) -> tuple[str, int]:
    """Return the delimiter, and the number of lines before the header: Excel may write `sep=;` there."""
    with open_bytes(path, local) as file:
        header = file.readline(MAX_ROW_CHARS).decode("utf-8-sig", errors="replace").rstrip("\r\n")
    if header[:4].lower() == "sep=" and header[4:] in _DELIMITERS:
        return header[4:], 1
    if _num_cells(header, usual) > 1:
        return usual, 0
    best = max(_DELIMITERS, key=lambda other: _num_cells(header, other))
    return (best, 0) if _num_cells(header, best) > 1 else (usual, 0)


def _num_cells(header: str, delimiter: str) -> int:
    try:
        return len(next(csv.reader([header], delimiter=delimiter), []))
    except csv.Error:
        return 0


def _csv_header(path: str, reader: Any) -> list[str]:
    try:
        names = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise DataError(f"{path}: the header is not valid CSV: {clip(str(error), 60)}") from None
    if not any(names):
        raise DataError(f"{path}: the first line must name the columns, it is empty")
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{path}: the header names the column `{clip(twice[0])}` twice")
    return names
