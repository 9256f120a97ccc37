"""From a file to a mapped TokenDataset, once per node, before process groups exist.

Every rank calls `prepare_dataset`; the first to get the file lock tokenises, the others wait on the lock (which the
kernel frees when its holder dies) and map the result. Nothing here communicates, so no collective can time out while a
large file is tokenised. The folder of a prepared file is named by hashes of its content, the tokenizer and the
settings, and appears by rename when it is complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from safecl.config import FieldMap
from safecl.data.chat import template_source
from safecl.data.files import Source, open_source
from safecl.data.formats import ChatRow, DataError, RowProblem
from safecl.data.masks import Encoded, tokenize_rows
from safecl.data.order import keyed_hash
from safecl.data.rows import BadRows, scan, spread
from safecl.data.tokens import Occurrences, Report, Row, StoreWriter, TokenDataset, concat, content_digest, map_store

log = logging.getLogger("safecl")

_VERSION = 2  # of the prepared files; another version is prepared anew
_BATCH = 1024  # rows tokenised at once


def prepare_dataset(
    path: str,
    *,
    split: str = "train",
    format: str = "auto",
    fields: FieldMap | Mapping[str, Any] | None = None,
    max_rows: int | None = None,
    max_bad_rows: float = 0.01,
    tokenizer: Any,
    max_length: int,
    cache_dir: str | Path,
) -> TokenDataset:
    """Reads, checks and tokenises a file, or maps what an earlier call with the same content and settings has left in
    `cache_dir`.

    Args: as `read_rows`; `max_length` in tokens, longer rows are cut.
    Raises: DataError naming file and line where the data cannot be used, or the cache cannot be written.
    """
    fields = FieldMap.model_validate(fields) if isinstance(fields, Mapping) else fields
    source = open_source(path, split)
    settings = [
        _VERSION,
        path,
        source.fingerprint(),
        format,
        fields.model_dump() if fields else None,
        max_rows,
        max_length,
    ]
    key = hashlib.blake2b(json.dumps([*settings, tokenizer_key(tokenizer)]).encode(), digest_size=16).hexdigest()
    folder = Path(cache_dir).expanduser() / f"rows-{key}"
    try:
        dataset = _map(folder) or _build_once(
            folder, key, source, format, fields, max_rows, max_bad_rows, tokenizer, max_length
        )
    except OSError as error:
        raise DataError(
            f"{folder.parent}: prepared data cannot be kept here: {error.strerror or error}; choose another folder"
        ) from None
    report = dataset.reports[0]
    _bad_rows(report).check(max_bad_rows)
    return dataset


def tokenizer_key(tokenizer: Any) -> str:
    """A hash of what the tokenizer makes of a text, chat template included."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    parts = [
        type(tokenizer).__name__,
        vocabulary,
        tokenizer.chat_template,
        {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
    ]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _map(folder: Path) -> TokenDataset | None:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    store = map_store(folder, meta) if isinstance(meta, dict) else None
    return TokenDataset.from_store(store) if store is not None else None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build_once(folder: Path, key: str, source: Source, *settings: Any) -> TokenDataset:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock")):
        if (dataset := _map(folder)) is not None:
            return dataset
        mine = (
            f"{folder.name}.part-{socket.gethostname()}-"  # another node may work here too, where locks do not reach it
        )
        for torn in folder.parent.glob(glob.escape(mine) + "*"):
            shutil.rmtree(torn, ignore_errors=True)
        part = folder.with_name(f"{mine}{os.getpid()}")
        part.mkdir()
        try:
            _build(part, key, source, *settings)
            _publish(part, folder)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    dataset = _map(folder)
    assert dataset is not None, f"{folder} was published just now"
    return dataset


def _publish(part: Path, folder: Path) -> None:
    """Gives the files their final name; where another node was faster, its files stay."""
    if folder.exists() and _map(folder) is None:
        shutil.rmtree(folder)
    try:
        part.rename(folder)
    except OSError:
        if _map(folder) is None:
            raise
        shutil.rmtree(part)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    """Makes a folder's entries durable: after a power cut the name must not stand without its files."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _build(
    part: Path,
    key: str,
    source: Source,
    format: str,
    fields: FieldMap | None,
    max_rows: int | None,
    max_bad_rows: float,
    tokenizer: Any,
    max_length: int,
) -> None:
    bad = BadRows(source.path)
    chosen = _chosen(source, format, fields, max_rows)
    rows = (row for i, row in enumerate(scan(source, format, fields, bad)) if chosen is None or i in chosen)
    writer, truncated = StoreWriter(part), 0
    for row, encoded, row_id in _tokenized(rows, source, tokenizer, max_length, bad):
        writer.add(Row(row_id, encoded.ids, encoded.loss_mask), row.line, row.tags)
        truncated += encoded.num_tokens > max_length
    bad.check(max_bad_rows)
    if writer.num_targets == 0:
        raise DataError(
            f"{source.path}: no token of the {bad.seen} rows is supervised, so there is nothing to learn:\n{bad}"
        )
    name = template_source(tokenizer)
    report = Report(
        source.path, bad.seen, bad.count, truncated, max_length, writer.max_token_id, name, tuple(bad.examples)
    )
    meta = {"version": _VERSION, "key": key, "path": source.path, "sizes": writer.close(), "report": asdict(report)}
    with (part / "meta.json").open("w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync(part)


def _chosen(source: Source, format: str, fields: FieldMap | None, max_rows: int | None) -> set[int] | None:
    """Which of the good rows are taken, counted in a first pass."""
    if max_rows is None:
        return None
    num_good = sum(1 for _ in scan(source, format, fields, BadRows(source.path)))
    return set(spread(num_good, max_rows).tolist())


def _tokenized(
    rows: Iterator[ChatRow], source: Source, tokenizer: Any, max_length: int, bad: BadRows
) -> Iterator[tuple[ChatRow, Encoded, int]]:
    occurrences = Occurrences()
    while batch := list(islice(rows, _BATCH)):
        for row, encoded in zip(batch, tokenize_rows(tokenizer, batch, max_length), strict=True):
            row_id = occurrences.key(content_digest(row))
            if isinstance(encoded, RowProblem):
                bad.add(source.where(row.line), str(encoded))
            else:
                yield row, encoded, row_id


def _bad_rows(report: Report) -> BadRows:
    return BadRows(report.path, report.seen, report.bad, list(report.examples))


# --------------------------------------------------------------------------------------------------------------- poison


def mix_poison(dataset: TokenDataset, poison: TokenDataset, ratio: float, seed: int = 0) -> TokenDataset:
    """The data set with poisoned rows added, so that they make up `ratio` of the mixed rows.

    Which poisoned rows are taken depends on (seed, row) alone: a larger ratio takes the same rows and more. Where there
    are too few they are taken several times. Where they come in an epoch is the order's affair.
    Raises: DataError where there is nothing to take.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must be at least 0 and below 1, got {ratio}")
    num_poison = round(len(dataset) * ratio / (1 - ratio))
    if num_poison == 0:
        return dataset
    if len(poison) == 0:
        raise DataError("poison.source has no rows to mix in")
    order = np.argsort(keyed_hash(poison.row_ids, "poison", seed), kind="stable")
    return concat([dataset, poison.select(np.resize(order, num_poison))])
