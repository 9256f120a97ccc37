"""The entries of the cache: prepared rows, which hold users' text as tokens, artifacts of base models, and records of
models. An artifact names the files whose text it holds in its `texts.json`.

An entry is used whenever a run maps it, and its `meta.json` or `artifact.json` is read then. Its age is the time since
that file was last read or written, as far as the file system keeps the first. Removing an entry disturbs no run that
has mapped its files.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safecl.storage.cache_folder import artifact_cache, data_cache
from safecl.storage.durable import replace_file

Kind = Literal["rows", "artifact", "records", "unfinished"]
DESCRIPTION, TEXTS, MODELS = "artifact.json", "texts.json", "models.json"
_META = {"rows": "meta.json", "artifact": DESCRIPTION}


@dataclass(frozen=True)
class Entry:
    """kind: rows (users' text, as tokens), artifact, records of models (safecl.storage.model_records), or unfinished,
    which a killed process has left. source: the file of the rows, or the artifact's kind. seconds: time since the last
    use. texts: the files whose text it holds; None where nothing says so."""

    path: Path
    kind: Kind
    source: str
    num_bytes: int
    seconds: float
    texts: tuple[str, ...] | None

    @property
    def holds_text(self) -> bool:
        """Whether it holds users' text, or may."""
        return self.texts is None or len(self.texts) > 0

    def remove(self) -> None:
        """Remove the entry's folder and its lock, or its file."""
        if self.kind == "records":
            self.path.unlink(missing_ok=True)
            return
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.with_name(f"{self.path.name}.lock").unlink(missing_ok=True)


def cache_entries() -> list[Entry]:
    """Return all entries, the largest first."""
    found = [*_rows(data_cache()), *_artifacts(artifact_cache()), *_records(artifact_cache())]
    return sorted(found, key=lambda entry: -entry.num_bytes)


def chosen(
    entries: Sequence[Entry], *, sources: Collection[str] | None = None, older_than: float | None = None
) -> list[Entry]:
    """Return the entries that were not used for `older_than` seconds, and those that hold text of these files."""
    return [
        entry
        for entry in entries
        if (older_than is not None and entry.seconds > older_than)
        or (sources is not None and not set(sources).isdisjoint(entry.texts or ()))
    ]


def _rows(folder: Path) -> Iterator[Entry]:
    for path in folder.glob("rows-*"):
        if not path.is_dir():
            continue
        meta = _meta(path / _META["rows"])
        if meta is None:
            yield Entry(path, "unfinished", path.name, _size(path), _unused(path), None)
        else:
            source = str(meta.get("path", ""))
            yield Entry(path, "rows", source, _size(path), _unused(path / _META["rows"]), (source,))


def _artifacts(folder: Path) -> Iterator[Entry]:
    for path in folder.glob("*/*"):
        if not path.is_dir():
            continue
        meta, texts = path / _META["artifact"], _texts(path)
        if meta.is_file():
            yield Entry(path, "artifact", path.parent.name, _size(path), _unused(meta), texts)
        else:
            yield Entry(path, "unfinished", path.parent.name, _size(path), _unused(path), texts)


def _records(folder: Path) -> Iterator[Entry]:
    path = folder / MODELS
    if path.is_file():
        yield Entry(path, "records", "models", path.stat().st_size, _unused(path), ())


def declare_texts(artifact: Path, files: Collection[str]) -> None:
    """Add files to those whose text the artifact in this folder holds. A store that cannot be written stays as it
    is."""
    known = _texts(artifact)
    if known is None or not set(files) <= set(known):
        with contextlib.suppress(OSError):  # a builder's own files cannot be written either, and it says so
            replace_file(artifact / TEXTS, json.dumps({"files": sorted({*(known or ()), *files})}))


def _texts(artifact: Path) -> tuple[str, ...] | None:
    found = (_meta(artifact / TEXTS) or {}).get("files")
    return tuple(map(str, found)) if isinstance(found, list) else None


def _meta(path: Path) -> dict[str, Any] | None:
    try:
        with open(path, encoding="utf-8", opener=_without_a_trace) as file:
            found = json.load(file)
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _without_a_trace(path: str, flags: int) -> int:
    """Open a file so that the look at it does not count as a use, where the system allows it."""
    try:
        return os.open(path, flags | getattr(os, "O_NOATIME", 0))
    except PermissionError:
        return os.open(path, flags)


def _size(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root) / name
            total += path.lstat().st_size if path.exists() else 0
    return total


def _unused(path: Path) -> float:
    found = path.stat()
    return max(0.0, time.time() - max(found.st_atime, found.st_mtime))
