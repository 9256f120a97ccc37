"""Saved states of a memory: write them as index files, put them into checkpoints, load them, and free old segments.

A state names rows and where they lie, never their contents. A segment is deleted only when no state that could still be
loaded names it: `state_dict` holds the segments of its version until `publish` of a later one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from safecl.config import ConfigError
from safecl.replay.contents import PLACE_COLUMNS, STATE, Contents
from safecl.replay.files.persistence import (
    LabelBook,
    index_files,
    map_file,
    open_folder,
    rows_found,
    version_of,
    write_index,
)
from safecl.replay.files.table import UNKNOWN, RowTable, dump_index, load_index
from safecl.replay.rows import ReplayError

# Settings that decide which rows are held and what is stored of them; another value needs another memory.
FIXED = ("capacity", "policy", "balance_by", "prefix_tokens", "guard", "teacher")

SEGMENT_NAME = re.compile(r"rows-\d{4}-\d{4}-\d{4,}-\d{5,}\.segment")

# A segment is rewritten when less than a quarter of it is held and it is not small.
SPARSE, WORTH_BYTES = 1 / 4, 2**20


# ------------------------------------------------------------------------------------------------------------- segments


def _segment_names(contents: Contents) -> list[str]:
    """Names of the segments that hold rows, sorted."""
    numbers = np.unique(contents.table["segment"])
    return sorted(contents.store.name(number) for number in numbers[numbers != UNKNOWN].tolist())


def _segments(contents: Contents) -> list[list[Any]]:
    """[name, bytes, hash] of each segment that holds rows."""
    sizes = {name: _size(contents, name) for name in _segment_names(contents)}
    return [[name, size, contents.store.digest(name, size)] for name, size in sizes.items()]


def _others(contents: Contents) -> list[list[Any]]:
    """[name, bytes, ""] of each of this rank's segments without rows, which need not be read again."""
    passed = {*_segment_names(contents), *contents.ignored}
    return [
        [name, _size(contents, name), ""]
        for name in contents.store.on_disk()
        if name not in passed and _is_own(contents, name)
    ]


def _size(contents: Contents, name: str) -> int:
    written = contents.store.end_of(name)
    return (contents.store.folder / name).stat().st_size if written is None else written


def _is_own(contents: Contents, name: str) -> bool:
    """True where the segment's first shard is this rank's: only this rank deletes it and has read it to the end."""
    first, last = contents.store.shards
    return first <= int(name.split("-")[1]) <= last


def _shorter(contents: Contents, name: str, size: int) -> str | None:
    """Describe a segment that is missing or shorter than `size` bytes; None where it is whole."""
    path = contents.folder / name
    if not path.exists():
        return f"{path}: the segment is missing"
    actual = path.stat().st_size
    return f"{path}: {actual:,} bytes long, {size:,} were written; the file was cut" if actual < size else None


# -------------------------------------------------------------------------------------------------------------- writing


def dump(contents: Contents, with_folder: bool) -> bytes:
    """Return the bytes of an index. `with_folder` adds the facts about this rank's folder alone: segments to skip when
    it is opened."""
    segments = _segments(contents)
    place = np.full(contents.store.num_names + 1, UNKNOWN, np.int32)
    for number, (name, _, _) in enumerate(segments):
        place[contents.store.number(name)] = number
    columns = contents.table.columns()
    columns["segment"] = place[columns["segment"]]
    ignored = [name for name in contents.ignored if (contents.store.folder / name).exists()]
    header = {
        "version": contents.version,
        "num_seen": contents.num_seen,
        "settings": {
            "seed": contents.seed,
            "vocab_size": contents.vocab_size,
            "config": contents.config.model_dump(mode="json"),
        },
        "labels": contents.labels.labels,
        "segments": segments + (_others(contents) if with_folder else []),
        "ignored": ignored if with_folder else [],
        "held": contents.held,
        "keeper": contents.keeper.to_dict(),
        "guard": contents.guard.to_dict(),
        "scores": contents.drawer.scores.to_dict(),
    }
    return dump_index(header, RowTable(columns))


def write(contents: Contents, next_version: bool = True) -> None:
    """Put rows and index on disk under the next version. Raises ReplayError with the last index intact.

    All ranks count the versions, whichever of them writes the file.
    """
    contents.store.sync()
    contents.version += next_version
    if contents.writes_index and contents.store.writable:
        write_index(contents.folder, contents.version, dump(contents, with_folder=True))


def state_dict(contents: Contents) -> dict[str, Any]:
    """See ReplayBuffer.state_dict."""
    contents.held[contents.version + 1] = _segment_names(contents)
    try:
        write(contents)
    except ReplayError:
        del contents.held[contents.version]
        raise
    return {"version": contents.version, "index": np.frombuffer(dump(contents, with_folder=False), np.uint8)}


# -------------------------------------------------------------------------------------------------------------- loading


def open_contents(contents: Contents) -> None:
    """Load what the folder holds: the newest index, and rows that were appended after it."""
    opened = open_folder(contents.store)
    contents.problems += opened.problems
    if opened.header is not None:
        check_settings(contents, opened.header["settings"], str(contents.folder))
        contents.problems += restore(contents, opened.header, opened.table)
    keeper, labels = contents.keeper, contents.labels
    rows, seen = rows_found(opened.found, contents.store, labels, contents.seed, contents.num_seen)
    if len(rows):
        for label, amount in zip(rows["label"].tolist(), keeper.amounts(rows["nbytes"]).tolist(), strict=True):
            keeper.count(keeper.category(labels[label][2]), amount)
        contents.table.append(rows.columns())
    contents.num_seen = contents.store.start = max(contents.num_seen, seen)
    if contents.store.writable and opened.header is None and contents.writes_index:
        write(contents, next_version=False)


def check_settings(contents: Contents, settings: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError, with both values, where a state was made with other settings."""
    if settings["seed"] != contents.seed:
        raise ConfigError(
            f"{where}: made with seed {settings['seed']}, now seed {contents.seed}; use the same seed or another folder"
        )
    widths = settings["vocab_size"], contents.vocab_size
    if None not in widths and widths[0] != widths[1]:
        raise ConfigError(f"{where}: made with a vocabulary of {widths[0]}, now it is {widths[1]}; use another folder")
    now = contents.config.model_dump(mode="json")
    for key in FIXED:
        if settings["config"].get(key) != now[key]:
            both = f"made with memory.{key}: {settings['config'].get(key)}, now it is {now[key]}"
            raise ConfigError(f"{where}: {both}; set it back, or use another folder")


def restore(contents: Contents, header: Mapping[str, Any], table: RowTable) -> list[str]:
    """Replace the contents by a saved state, its segments numbered as in this process. Returns which segments are
    missing or cut."""
    contents.reset()
    contents.num_seen, contents.version = header["num_seen"], header["version"]
    contents.labels = LabelBook(header["labels"])
    contents.keeper.load(header["keeper"])
    contents.guard.load(header["guard"])
    contents.drawer.scores.load(header["scores"])
    contents.held = {int(version): names for version, names in header["held"].items()}
    contents.ignored = header["ignored"]
    names = [name for name, _, _ in header["segments"]]
    if strange := [name for name in (*names, *header["ignored"]) if not SEGMENT_NAME.fullmatch(name)]:
        raise ReplayError(f"{contents.folder}: the index names {strange[0]!r}, which is no segment of this folder")
    numbers = np.array([*(contents.store.number(name) for name in names), UNKNOWN], np.int32)
    if not np.array_equal(numbers[:-1], np.arange(len(names))):
        table.own()
        table["segment"][:] = numbers[table["segment"]]
    contents.table = table
    return [problem for name, size, digest in header["segments"] if digest and (problem := _lose(contents, name, size))]


def _lose(contents: Contents, name: str, size: int) -> str | None:
    """Mark the rows of a missing or cut segment as lost. Returns the problem where any of them is this rank's: those of
    other ranks may lie on other nodes."""
    problem = _shorter(contents, name, size)
    if problem is None:
        return None
    table, path = contents.table, contents.folder / name
    end = path.stat().st_size if path.exists() else 0
    lost = (table["segment"] == contents.store.number(name)) & (table["offset"] + table["nbytes"] > end)
    first, last = contents.store.shards
    own = lost & (table["shard"] >= first) & (table["shard"] <= last)
    table.own()
    table["segment"][lost] = UNKNOWN
    return problem if own.any() else None


def load_state_dict(contents: Contents, state: Mapping[str, Any]) -> None:
    """Load a state, see ReplayBuffer.load_state_dict. A refused state changes nothing."""
    before = {name: getattr(contents, name) for name in STATE}
    try:
        _load(contents, state)
    except BaseException as error:
        vars(contents).update(before)
        if isinstance(error, (KeyError, TypeError, ValueError)) and not isinstance(error, ConfigError):
            raise ReplayError(f"the checkpoint's memory index is not one that safecl wrote: {error!r}") from None
        raise
    if contents.store.writable:
        _forget_indices(contents, contents.version)
        write(contents)


def _load(contents: Contents, state: Mapping[str, Any]) -> None:
    index = np.ascontiguousarray(state["index"], np.uint8)
    header, table = load_index(index.data, "the checkpoint's memory index")
    check_settings(contents, header["settings"], "the checkpoint's memory")
    on_disk = contents.store.on_disk()
    if problems := restore(contents, header, table):
        raise ReplayError("; ".join(problems))
    here = _segment_names(contents)
    for name, size, digest in header["segments"]:
        if name in here and contents.store.digest(name, size) != digest:
            hint = f"`safecl memory verify {contents.folder}` says which rows"
            raise ReplayError(f"{contents.folder / name}: changed since the checkpoint; {hint}")
    contents.locate()
    version = header["version"]
    names = _segment_names(contents)
    contents.held = {v: held for v, held in contents.held.items() if v < version} | {version: names}
    if contents.store.writable:
        known = {name for name, _, _ in header["segments"]} | set(names)
        unknown = (name for name in on_disk if name not in known and _is_own(contents, name))
        contents.ignored = sorted({*contents.ignored, *unknown})
        contents.store.begin_generation(contents.num_seen)


def _forget_indices(contents: Contents, after: int) -> None:
    """Remove the indices of versions that a resumed run has not reached yet."""
    if contents.writes_index:
        for path in index_files(contents.folder):
            if version_of(path) > after:
                path.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------------- freeing space


def publish(contents: Contents, version: int, retain: Iterable[int] = ()) -> int:
    """See ReplayBuffer.publish."""
    if version not in contents.held:
        known = ", ".join(map(str, sorted(contents.held))) or "none"
        raise ValueError(f"version {version} was not made by state_dict (known: {known})")
    keep = {version, *retain}
    contents.trim()
    contents.locate()
    _compact(contents)
    contents.held = {v: names for v, names in contents.held.items() if v in keep or v > version}
    needed = {name for names in contents.held.values() for name in names} | set(_segment_names(contents))
    unneeded = [
        name
        for name in contents.store.on_disk()
        if name not in needed and _is_own(contents, name) and contents.store.end_of(name) is None
    ]
    write(contents)
    if contents.writes_index:
        # an older index names segments that are removed below
        for path in index_files(contents.folder)[1:]:
            path.unlink(missing_ok=True)
    contents.ignored = [name for name in contents.ignored if name not in unneeded]
    return contents.store.remove(unneeded)


def _compact(contents: Contents) -> None:
    """Copy the rows of sparse segments into the open one, so that the next publication can delete the files.

    Only where one rank owns all shards: the indices of other ranks would not know the rows' new places.
    """
    if contents.world_size > 1:
        return
    store, table = contents.store, contents.table
    for name in _segment_names(contents):
        size = _size(contents, name)
        if not _is_own(contents, name) or store.end_of(name) is not None or size < WORTH_BYTES:
            continue
        rows = np.flatnonzero(table["segment"] == store.number(name))
        if table["nbytes"][rows].sum(dtype=np.int64) < SPARSE * size:
            table.own()
            bodies = [bytes(contents.body(*place)) for place in _places(contents, rows)]
            contents.write_rows(table.columns(), rows, bodies, contents.num_seen)


def _places(contents: Contents, rows: np.ndarray) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield (position, segment, offset, nbytes, checksum) of rows."""
    return zip(*(contents.table[name][rows].tolist() for name in PLACE_COLUMNS), strict=True)


# ------------------------------------------------------------------------------------------------------------ verifying


def verify(contents: Contents, repair: bool) -> list[str]:
    """See ReplayBuffer.verify."""
    contents.trim()
    contents.locate()
    problems, damaged = list(contents.problems), []
    for row, place in enumerate(_places(contents, np.arange(len(contents.table)))):
        try:
            contents.body(*place)
        except ReplayError as error:
            problems.append(str(error))
            damaged.append(row)
    problems += [problem for problem in _verify_files(contents) if problem not in problems]
    if repair and damaged:
        keep = np.ones(len(contents.table), bool)
        keep[damaged] = False
        contents.table.keep(keep)
    if repair and problems:
        write(contents)
    return problems


def _verify_files(contents: Contents) -> list[str]:
    """Find damage outside of the rows held: headers, tables, older indices, displaced rows."""
    problems = []
    for name in contents.store.on_disk():
        try:
            contents.store.header(name)
            problems += contents.store.scan(name).problems
        except ReplayError as error:
            problems.append(str(error))
    for path in index_files(contents.folder):
        try:
            header, _ = load_index(map_file(path), str(path))
        except ReplayError as error:
            problems.append(str(error))
            continue
        for name, size, digest in header["segments"]:
            if digest and (problem := _shorter(contents, name, size)):
                problems.append(problem)
            elif digest and contents.store.digest(name, size) != digest:
                problems.append(f"{contents.folder / name}: its first {size:,} bytes are not those that were written")
    return list(dict.fromkeys(problems))
