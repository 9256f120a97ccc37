"""The state of a buffer as bytes: written as its index file, put into checkpoints, taken over again; and which segments
that frees.

A state names rows and where they lie, never their contents. Segments are deleted only when no state that could still be
loaded names them: `state_dict` holds those of its version until `publish` of a later one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from safecl.config import ConfigError
from safecl.replay.files.persistence import LabelBook, index_files, map_file, version_of, write_index
from safecl.replay.files.table import UNKNOWN, RowTable, dump_index, load_index
from safecl.replay.insertion import write_rows
from safecl.replay.rows import ReplayError

if TYPE_CHECKING:
    from safecl.replay.buffer import ReplayBuffer

# Settings that decide which rows are held and what is stored of them; another value needs another memory.
FIXED = ("capacity", "policy", "balance_by", "prefix_tokens", "guard", "teacher")

SEGMENT_NAME = re.compile(r"rows-\d{4}-\d{4}-\d{4,}-\d{5,}\.segment")

# A segment is rewritten when less than a quarter of it is held, and worth it.
SPARSE, WORTH_BYTES = 1 / 4, 2**20


def _segment_names(buffer: ReplayBuffer) -> list[str]:
    """Names of the segments that hold rows, sorted."""
    numbers = np.unique(buffer.table["segment"])
    return sorted(buffer.store.name(number) for number in numbers[numbers != UNKNOWN].tolist())


def _segments(buffer: ReplayBuffer) -> list[list[Any]]:
    """[name, bytes, hash] of each segment that holds rows."""
    sizes = {name: _size(buffer, name) for name in _segment_names(buffer)}
    return [[name, size, buffer.store.digest(name, size)] for name, size in sizes.items()]


def _others(buffer: ReplayBuffer) -> list[list[Any]]:
    """[name, bytes, ""] of this rank's segments that hold no rows any more and need not be read again."""
    passed = {*_segment_names(buffer), *buffer.ignored}
    return [
        [name, _size(buffer, name), ""]
        for name in buffer.store.on_disk()
        if name not in passed and _is_own(buffer, name)
    ]


def _size(buffer: ReplayBuffer, name: str) -> int:
    written = buffer.store.end_of(name)
    return (buffer.store.folder / name).stat().st_size if written is None else written


def _is_own(buffer: ReplayBuffer, name: str) -> bool:
    """True for segments whose first shard is this rank's: what it deletes, and what it has read to the end."""
    first, last = buffer.store.shards
    return first <= int(name.split("-")[1]) <= last


def dump(buffer: ReplayBuffer, with_folder: bool) -> bytes:
    """The bytes of an index. `with_folder` adds what concerns this rank's folder alone: segments to pass over when it
    is opened."""
    segments = _segments(buffer)
    place = np.full(buffer.store.num_names + 1, UNKNOWN, np.int32)
    for number, (name, _, _) in enumerate(segments):
        place[buffer.store.number(name)] = number
    columns = buffer.table.columns()
    columns["segment"] = place[columns["segment"]]
    header = {
        "version": buffer.version,
        "num_seen": buffer.num_seen,
        "settings": {
            "seed": buffer.seed,
            "vocab_size": buffer.vocab_size,
            "config": buffer.config.model_dump(mode="json"),
        },
        "labels": buffer.labels.labels,
        "segments": segments + (_others(buffer) if with_folder else []),
        "ignored": [name for name in buffer.ignored if (buffer.store.folder / name).exists()] if with_folder else [],
        "held": buffer.held,
        "keeper": buffer.keeper.to_dict(),
        "guard": buffer.guard.to_dict(),
        "scores": buffer.drawer.scores.to_dict(),
    }
    return dump_index(header, RowTable(columns))


def write(buffer: ReplayBuffer, next_version: bool = True) -> None:
    """Puts rows and index on the disk under the next version. Raises ReplayError with the last index intact.

    Versions are counted alike on all ranks, whichever of them writes the file.
    """
    buffer.store.sync()
    buffer.version += next_version
    if buffer.writes_index and buffer.store.writable:
        write_index(buffer.folder, buffer.version, dump(buffer, with_folder=True))


def state_dict(buffer: ReplayBuffer) -> dict[str, Any]:
    """See ReplayBuffer.state_dict."""
    buffer.held[buffer.version + 1] = _segment_names(buffer)
    try:
        write(buffer)
    except ReplayError:
        del buffer.held[buffer.version]
        raise
    return {"version": buffer.version, "index": np.frombuffer(dump(buffer, with_folder=False), np.uint8)}


def check_settings(buffer: ReplayBuffer, settings: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError where a state was made with other settings, with both values."""
    if settings["seed"] != buffer.seed:
        raise ConfigError(
            f"{where}: made with seed {settings['seed']}, now seed {buffer.seed}; use the same seed or another folder"
        )
    widths = settings["vocab_size"], buffer.vocab_size
    if None not in widths and widths[0] != widths[1]:
        raise ConfigError(f"{where}: made with a vocabulary of {widths[0]}, now it is {widths[1]}; use another folder")
    now = buffer.config.model_dump(mode="json")
    for key in FIXED:
        if settings["config"].get(key) != now[key]:
            raise ConfigError(
                f"{where}: made with memory.{key}: {settings['config'].get(key)}, now it is {now[key]}; set it back, or use another folder"
            )


def take_over(buffer: ReplayBuffer, header: Mapping[str, Any], table: RowTable) -> list[str]:
    """Makes a state the buffer's own, with segments numbered as in this process; returns which segments are missing or
    cut."""
    buffer.reset()
    buffer.num_seen, buffer.version = header["num_seen"], header["version"]
    buffer.labels = LabelBook(header["labels"])
    buffer.keeper.load(header["keeper"])
    buffer.guard.load(header["guard"])
    buffer.drawer.scores.load(header["scores"])
    buffer.held = {int(version): names for version, names in header["held"].items()}
    buffer.ignored = header["ignored"]
    names = [name for name, _, _ in header["segments"]]
    if strange := [name for name in (*names, *header["ignored"]) if not SEGMENT_NAME.fullmatch(name)]:
        raise ReplayError(f"{buffer.folder}: the index names {strange[0]!r}, which is no segment of this folder")
    numbers = np.array([*(buffer.store.number(name) for name in names), UNKNOWN], np.int32)
    if not np.array_equal(numbers[:-1], np.arange(len(names))):
        table.own()
        table["segment"][:] = numbers[table["segment"]]
    buffer.table = table
    return [problem for name, size, digest in header["segments"] if digest and (problem := _lose(buffer, name, size))]


def _lose(buffer: ReplayBuffer, name: str, size: int) -> str | None:
    """Marks rows of a missing or cut segment as lost; says so where they are this rank's. Other ranks' rows may lie on
    other nodes."""
    problem = _shorter(buffer, name, size)
    if problem is None:
        return None
    table, path = buffer.table, buffer.folder / name
    end = path.stat().st_size if path.exists() else 0
    lost = (table["segment"] == buffer.store.number(name)) & (table["offset"] + table["nbytes"] > end)
    first, last = buffer.store.shards
    own = lost & (table["shard"] >= first) & (table["shard"] <= last)
    table.own()
    table["segment"][lost] = UNKNOWN
    return problem if own.any() else None


def _shorter(buffer: ReplayBuffer, name: str, size: int) -> str | None:
    path = buffer.folder / name
    if not path.exists():
        return f"{path}: the segment is missing"
    actual = path.stat().st_size
    return f"{path}: {actual:,} bytes long, {size:,} were written; the file was cut" if actual < size else None


def load_state_dict(buffer: ReplayBuffer, state: Mapping[str, Any]) -> None:
    """See ReplayBuffer.load_state_dict. The buffer stays as it is where the state is refused."""
    before = {name: getattr(buffer, name) for name in buffer.STATE}
    try:
        _load(buffer, state)
    except BaseException as error:
        for name, value in before.items():
            setattr(buffer, name, value)
        if isinstance(error, (KeyError, TypeError, ValueError)) and not isinstance(error, ConfigError):
            raise ReplayError(f"the checkpoint's memory index is not one that safecl wrote: {error!r}") from None
        raise
    if buffer.store.writable:
        _forget_indices(buffer, buffer.version)
        write(buffer)


def _load(buffer: ReplayBuffer, state: Mapping[str, Any]) -> None:
    header, table = load_index(
        memoryview(np.ascontiguousarray(state["index"], np.uint8)), "the checkpoint's memory index"
    )
    check_settings(buffer, header["settings"], "the checkpoint's memory")
    on_disk = buffer.store.on_disk()
    if problems := take_over(buffer, header, table):
        raise ReplayError("; ".join(problems))
    here = _segment_names(buffer)
    for name, size, digest in header["segments"]:
        if name in here and buffer.store.digest(name, size) != digest:
            raise ReplayError(
                f"{buffer.folder / name}: changed since the checkpoint; `safecl memory verify {buffer.folder}` says which rows"
            )
    buffer.locate()
    version = header["version"]
    buffer.held = {v: names for v, names in buffer.held.items() if v < version} | {version: _segment_names(buffer)}
    known = {name for name, _, _ in header["segments"]} | set(_segment_names(buffer))
    if buffer.store.writable:
        buffer.ignored = sorted(
            {*buffer.ignored, *(name for name in on_disk if name not in known and _is_own(buffer, name))}
        )
        buffer.store.begin_generation(buffer.num_seen)


def _forget_indices(buffer: ReplayBuffer, after: int) -> None:
    """Removes the indices of versions that a resumed run has not reached yet."""
    if buffer.writes_index:
        for path in index_files(buffer.folder):
            if version_of(path) > after:
                path.unlink(missing_ok=True)


def publish(buffer: ReplayBuffer, version: int, retain: Iterable[int] = ()) -> int:
    """See ReplayBuffer.publish."""
    if version not in buffer.held:
        known = ", ".join(map(str, sorted(buffer.held))) or "none"
        raise ValueError(f"version {version} was not made by state_dict (known: {known})")
    keep = {version, *retain}
    buffer.trim()
    buffer.locate()
    _compact(buffer)
    buffer.held = {v: names for v, names in buffer.held.items() if v in keep or v > version}
    needed = {name for names in buffer.held.values() for name in names} | set(_segment_names(buffer))
    unneeded = [
        n for n in buffer.store.on_disk() if n not in needed and _is_own(buffer, n) and buffer.store.end_of(n) is None
    ]
    write(buffer)
    if buffer.writes_index:
        # an older index names segments that are about to go
        for path in index_files(buffer.folder)[1:]:
            path.unlink(missing_ok=True)
    buffer.ignored = [name for name in buffer.ignored if name not in unneeded]
    return buffer.store.remove(unneeded)


def _compact(buffer: ReplayBuffer) -> None:
    """Moves the rows of sparse segments into the open one, so that the files can go with the next publication.

    Only where one rank owns all shards: other ranks' indices would not know where the rows went.
    """
    if buffer.world_size > 1:
        return
    for name in _segment_names(buffer):
        if not _is_own(buffer, name) or buffer.store.end_of(name) is not None or _size(buffer, name) < WORTH_BYTES:
            continue
        rows = np.flatnonzero(buffer.table["segment"] == buffer.store.number(name))
        if buffer.table["nbytes"][rows].sum(dtype=np.int64) < SPARSE * _size(buffer, name):
            buffer.table.own()
            bodies = [bytes(buffer.body(*place)) for place in _places(buffer, rows)]
            write_rows(buffer, buffer.table.columns(), rows, bodies, buffer.num_seen)


def _places(buffer: ReplayBuffer, rows: np.ndarray) -> Iterator[tuple[int, ...]]:
    """Where rows lie: (position, segment, offset, nbytes, checksum)."""
    columns = ("position", "segment", "offset", "nbytes", "checksum")
    return zip(*(buffer.table[name][rows].tolist() for name in columns), strict=True)


def verify(buffer: ReplayBuffer, repair: bool) -> list[str]:
    """See ReplayBuffer.verify."""
    buffer.trim()
    buffer.locate()
    problems, damaged = list(buffer.problems), []
    for row, place in enumerate(_places(buffer, np.arange(len(buffer.table)))):
        try:
            buffer.body(*place)
        except ReplayError as error:
            problems.append(str(error))
            damaged.append(row)
    problems += [problem for problem in _verify_files(buffer) if problem not in problems]
    if repair and damaged:
        keep = np.ones(len(buffer.table), bool)
        keep[damaged] = False
        buffer.table.keep(keep)
    if repair and problems:
        write(buffer)
    return problems


def _verify_files(buffer: ReplayBuffer) -> list[str]:
    """Damage outside of rows: headers, tables, older indices, rows that are not held any more."""
    problems = []
    for name in buffer.store.on_disk():
        try:
            buffer.store.header(name)
            problems += buffer.store.scan(name).problems
        except ReplayError as error:
            problems.append(str(error))
    for path in index_files(buffer.folder):
        try:
            header, _ = load_index(map_file(path), str(path))
        except ReplayError as error:
            problems.append(str(error))
            continue
        for name, size, digest in header["segments"]:
            if digest and (problem := _shorter(buffer, name, size)):
                problems.append(problem)
            elif digest and buffer.store.digest(name, size) != digest:
                problems.append(f"{buffer.folder / name}: its first {size:,} bytes are not those that were written")
    return list(dict.fromkeys(problems))
