"""Raw rows of a file with their line numbers, read one by one: no JSONL, CSV or Parquet file is held in memory whole.

A row that cannot be read becomes a problem with its line number. Only a file that cannot be read at all raises.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safecl.data.messages import MAX_ROW_CHARS, DataError, clip
from safecl.data.reading.cells import without_nulls
from safecl.data.reading.csv_rows import csv_rows
from safecl.data.reading.json_rows import holds_one_value, json_rows, jsonl_rows
from safecl.data.reading.raw import PACKED, RawRow, lines_of, open_bytes, suffix_of
from safecl.data.reading.strangers import refuse_strangers
from safecl.storage.untrusted import UnusableWeights, inside, read_json

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
_JSON = (".jsonl", ".ndjson", ".json")
_LINES = (".csv", ".tsv", ".txt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")
_BLOCK = 2**20


@dataclass(frozen=True)
class Source:
    """A file, folder or hub data set. `rows()` starts from the first row at each call; `fingerprint()` changes with the
    content."""

    path: str
    unit: str  # "line" or "row": what RawRow.line counts
    rows: Callable[[], Iterator[RawRow]]
    fingerprint: Callable[[], str]

    def where(self, line: int) -> str:
        return _place(self.path, line, self.unit)


def unit_of(path: str) -> str:
    """The unit of row numbers: "line", or "row" where rows are not lines (Parquet, a JSON list, a hub data set)."""
    local = Path(path).expanduser()
    if suffix_of(local) not in _JSON:
        return "line" if suffix_of(local) in _LINES else "row"
    return "row" if local.is_file() and holds_one_value(local) else "line"


_unit_once = functools.lru_cache(64)(unit_of)  # called for every row of a file


def where(path: str, line: int) -> str:
    """Name a row by its place: `file:line`, or `file, row 3`."""
    return _place(path, line, _unit_once(path))


def _place(path: str, line: int, unit: str) -> str:
    return f"{path}:{line}" if unit == "line" else f"{path}, row {line}"


def open_source(path: str | Path, split: str = "train") -> Source:
    """Open a local file, a folder written by `datasets.save_to_disk`, or a hub data set.

    Args: `path`: a file, a folder, or a hub id (`name`, `owner/name`, or `owner/name:config`); `split` of a data set.
    Raises: DataError where none of these exists.
    """
    path = str(path)
    refuse_missing(path)
    local = Path(path).expanduser()
    if local.is_dir():
        return _dataset_folder(path, local, split)
    if local.is_file():
        return _file_source(path, local)
    return _hub_source(path, split)


def refuse_missing(path: str) -> None:
    """Raise DataError where `path` can only be a local file and does not exist. Reads no file and does not use the
    network."""
    local = Path(path).expanduser()
    if local.is_dir() or local.is_file():
        return
    if local.exists():
        raise DataError(f"{path}: not a regular file")
    if local.is_symlink():
        raise DataError(f"{path}: is a link that leads to no file")
    if suffix_of(local) in SUFFIXES or not _HUB_ID.fullmatch(path):
        raise DataError(f"{path}: no such file{_nearest(local)}")


def _nearest(path: Path) -> str:
    try:
        names = [p.name for p in path.parent.iterdir() if suffix_of(p) in SUFFIXES]
    except OSError:
        return f"; there is no folder {path.parent} either"
    near = difflib.get_close_matches(path.name, names, n=1) or difflib.get_close_matches(
        path.stem, names, n=1, cutoff=0.5
    )
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _file_source(path: str, local: Path) -> Source:
    suffix = suffix_of(local)
    try:
        refuse_strangers(path, local)
        unit = unit_of(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    readers: dict[str, Callable[[str, Path], Iterator[RawRow]]] = {
        ".csv": functools.partial(csv_rows, delimiter=","),
        ".tsv": functools.partial(csv_rows, delimiter="\t"),
        ".parquet": _parquet_rows,
        ".txt": _text_rows,
        **dict.fromkeys(_JSON, json_rows if unit == "row" else jsonl_rows),
    }
    if suffix not in readers:
        raise DataError(
            f"{path}: unknown kind of file `{suffix or local.name}`; known: {', '.join(SUFFIXES)}, each also with "
            f"{', '.join(PACKED)}"
        )
    return Source(path, unit, lambda: readers[suffix](path, local), lambda: _hash_file(local))


def _hash_file(local: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with local.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    kind = "".join(local.suffixes[-2:]) if local.suffix.lower() in PACKED else local.suffix
    return f"{kind.lower()}:{digest.hexdigest()}"


# --------------------------------------------------------------------------------------------------- CSV, text, Parquet


def _text_rows(path: str, local: Path) -> Iterator[RawRow]:
    with open_bytes(path, local) as file:
        for line, raw in lines_of(file):
            if raw is None or len(raw) > MAX_ROW_CHARS:
                yield RawRow(line, None, f"the line is enormous (over {MAX_ROW_CHARS // 2**20} MiB)")
            else:
                yield RawRow(line, {"text": raw.decode("utf-8", errors="surrogateescape")})


def _parquet_rows(path: str, local: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(local) as file:
            names, number = file.schema_arrow.names, 0
            if twice := [name for name in names if names.count(name) > 1]:
                raise DataError(f"{path}: has the column `{clip(twice[0])}` twice")
            for batch in file.iter_batches(1024):
                for columns in _batch_rows(batch):
                    number += 1
                    problem = "a value is not valid UTF-8" if columns is None else None
                    yield RawRow(number, columns, problem)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {clip(str(error), 80)}") from None


def _batch_rows(batch: Any) -> list[dict[str, Any] | None]:
    try:
        return [without_nulls(row) for row in batch.to_pylist()]
    except (UnicodeDecodeError, ValueError):
        return [_one_row(batch, i) for i in range(batch.num_rows)]


def _one_row(batch: Any, index: int) -> dict[str, Any] | None:
    try:
        return without_nulls(batch.slice(index, 1).to_pylist()[0])
    except (UnicodeDecodeError, ValueError):
        return None


# ------------------------------------------------------------------------------------------------- the datasets library


def _hub_source(path: str, split: str) -> Source:
    import datasets

    name, _, config = path.partition(":")
    try:
        loaded = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the library raises errors of many types
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = clip(lines[0], 160) if lines else type(error).__name__
        has_configs = "config" in str(error).lower() and not config
        hint = " (write `name:config` to choose a configuration)" if has_configs else ""
        raise DataError(f"{path}: no such file, and not a data set that the hub gives{hint}: {reason}") from None
    return _dataset_source(path, loaded)


def _dataset_folder(path: str, local: Path, split: str) -> Source:
    import datasets

    if not any((local / name).is_file() for name in ("state.json", "dataset_dict.json")):
        files = sorted(p.name for p in local.iterdir() if suffix_of(p) in SUFFIXES)
        hint = f"name one of its files: {clip(', '.join(files), 80)}" if files else "it holds no data files either"
        raise DataError(f"{path}: is a folder, and not one that datasets.save_to_disk wrote; {hint}")
    _refuse_files_elsewhere(path, local)
    try:
        loaded = datasets.load_from_disk(str(local))
    except Exception as error:  # as above
        raise DataError(f"{path}: not a readable data set folder: {clip(str(error), 120)}") from None
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(f"{path}: has no split `{split}`; it has {', '.join(loaded)}")
        loaded = loaded[split]
    return _dataset_source(path, loaded)


def _refuse_files_elsewhere(path: str, folder: Path) -> None:
    """Raise DataError where a saved data set names, or links to, files outside of its folder."""
    for state in folder.rglob("state.json"):
        try:
            names = [str(entry["filename"]) for entry in read_json(state)["_data_files"]]
            for name in ["dataset_info.json", *names]:
                inside(state.parent, name)
        except UnusableWeights as error:
            raise DataError(str(error)) from None
        except (KeyError, TypeError):
            raise DataError(f"{path}: {state.name} names no data files") from None


def _dataset_source(path: str, loaded: Any) -> Source:
    def rows() -> Iterator[RawRow]:
        for number, columns in enumerate(loaded, 1):
            yield RawRow(number, without_nulls(dict(columns)))

    return Source(path, "row", rows, lambda: f"datasets:{loaded._fingerprint}")
