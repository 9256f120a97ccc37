"""Prepares a file as a memory-mapped TokenDataset, once per node, before process groups exist.

Every rank calls `prepare_dataset`. The first to get the file lock tokenises. The others wait for the lock, which the
kernel frees when its holder dies, and map the result. Ranks do not communicate here, so no collective can time out
while a large file is tokenised. The folder of a prepared file is named by a hash of its content, the tokenizer and the
settings, and appears by rename when it is complete.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from safecl.config import FieldMap
from safecl.data.messages import ChatRow, DataError, RowProblem
from safecl.data.order import keyed_hash
from safecl.data.reading.files import Source, open_source
from safecl.data.reading.rows import BadRows, good_rows, spread
from safecl.data.rewriting import Rewriting
from safecl.data.templates.chat import template_source
from safecl.data.templates.masks import Encoded, tokenize_rows
from safecl.data.templates.template_dates import asks_for_date, date_of
from safecl.data.tokens import Occurrences, Report, Row, StoreWriter, TokenDataset, concat, content_digest, map_store
from safecl.storage.durable import sync_folder, write_file
from safecl.storage.locks import waiting_lock

log = logging.getLogger("safecl")

_VERSION = 7  # of the prepared files; files of another version are prepared again
_BATCH = 1024  # rows tokenised at once


@dataclass(frozen=True)
class _Settings:
    """The settings of `prepare_dataset`."""

    format: str
    fields: FieldMap | None
    max_rows: int | None
    max_bad_rows: float
    tokenizer: Any
    max_length: int
    rewriting: Rewriting | None = None


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
    rewriting: Rewriting | None = None,
) -> TokenDataset:
    """Read, check and tokenise a file, or map the result of an earlier call with the same content and settings.

    Args: as `read_rows`; `max_length` in tokens, longer rows are cut; `cache_dir` keeps the prepared files;
    `rewriting`: changes rows before they are tokenised, their ids stay those of the rows as they are read.
    Raises: DataError, with file and line, where the data cannot be used, or where the cache cannot be written.
    """
    fields = FieldMap.model_validate(fields) if isinstance(fields, Mapping) else fields
    source = open_source(path, split)
    settings = _Settings(format, fields, max_rows, max_bad_rows, tokenizer, max_length, rewriting)
    key = _key(path, source, settings)
    folder = Path(cache_dir).expanduser() / f"rows-{key}"
    try:
        dataset = _map(folder) or _build_once(folder, key, source, settings)
    except OSError as error:
        raise DataError(
            f"{folder.parent}: prepared data cannot be kept here: {error.strerror or error}; choose another folder"
        ) from None
    _bad_rows(dataset.reports[0]).check(max_bad_rows)
    return dataset


def _key(path: str, source: Source, settings: _Settings) -> str:
    fields = settings.fields.model_dump() if settings.fields else None
    file = [_VERSION, path, source.fingerprint()]
    parts = [*file, settings.format, fields, settings.max_rows, settings.max_length, tokenizer_key(settings.tokenizer)]
    if settings.rewriting is not None:
        parts.append(settings.rewriting.key)
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def tokenizer_key(tokenizer: Any) -> str:
    """Hash all of the tokenizer that decides the ids of a text, chat template included."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    parts = [
        type(tokenizer).__name__,
        vocabulary,
        tokenizer.chat_template,
        {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
    ]
    if asks_for_date(tokenizer.chat_template or ""):
        parts.append(date_of(tokenizer).isoformat())
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _map(folder: Path) -> TokenDataset | None:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    store = map_store(folder, meta) if isinstance(meta, dict) else None
    return TokenDataset.from_store(store) if store is not None else None


def _build_once(folder: Path, key: str, source: Source, settings: _Settings) -> TokenDataset:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with waiting_lock(folder.with_suffix(".lock")):
        if (dataset := _map(folder)) is not None:
            return dataset
        # Another node may work in the same folder, where file locks do not reach it: part names carry the host.
        mine = f"{folder.name}.part-{socket.gethostname()}-"
        for torn in folder.parent.glob(glob.escape(mine) + "*"):
            shutil.rmtree(torn, ignore_errors=True)
        part = folder.with_name(f"{mine}{os.getpid()}")
        part.mkdir()
        try:
            _build(part, key, source, settings)
            _publish(part, folder)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    dataset = _map(folder)
    assert dataset is not None, f"{folder} was published just now"
    return dataset


def _publish(part: Path, folder: Path) -> None:
    """Rename the files to their final name. Where another node was faster, its files stay."""
    if folder.exists() and _map(folder) is None:
        shutil.rmtree(folder)
    try:
        part.rename(folder)
    except OSError:
        if _map(folder) is None:
            raise
        shutil.rmtree(part)
    sync_folder(folder.parent)


def _build(part: Path, key: str, source: Source, settings: _Settings) -> None:
    """Write the prepared files into `part`; all of them are on the disk when it returns."""
    bad = BadRows(source.path)
    writer, truncated = StoreWriter(part), 0
    for row, encoded, row_id in _tokenized(_chosen_rows(source, settings, bad), source, settings, bad):
        writer.add(Row(row_id, encoded.ids, encoded.loss_mask), row.line, row.tags)
        truncated += encoded.num_tokens > settings.max_length
    bad.check(settings.max_bad_rows)
    if writer.num_targets == 0:
        raise DataError(
            f"{source.path}: no token of the {bad.seen} rows is supervised, so there is nothing to learn:\n{bad}"
        )
    report = Report(
        source.path, bad.seen, bad.count, truncated, settings.max_length, writer.max_token_id,
        template_source(settings.tokenizer), tuple(bad.examples), tuple(bad.told()),
    )  # fmt: skip
    meta = {"version": _VERSION, "key": key, "path": source.path, "sizes": writer.close(), "report": asdict(report)}
    write_file(part / "meta.json", [json.dumps(meta, indent=1).encode()])
    sync_folder(part)


def _chosen_rows(source: Source, settings: _Settings, bad: BadRows) -> Iterator[ChatRow]:
    """Yield `max_rows` of the good rows, which a first pass counts."""
    rows = good_rows(source, settings.format, settings.fields, bad)
    if settings.max_rows is None:
        yield from rows
        return
    num_good = sum(1 for _ in good_rows(source, settings.format, settings.fields, BadRows(source.path)))
    chosen = set(spread(num_good, settings.max_rows).tolist())
    yield from (row for i, row in enumerate(rows) if i in chosen)


def _tokenized(
    rows: Iterator[ChatRow], source: Source, settings: _Settings, bad: BadRows
) -> Iterator[tuple[ChatRow, Encoded, int]]:
    occurrences = Occurrences()
    while batch := list(islice(rows, _BATCH)):
        trained = batch
        if settings.rewriting is not None:
            trained = [settings.rewriting.apply(row, settings.tokenizer) for row in batch]
        for row, encoded in zip(batch, tokenize_rows(settings.tokenizer, trained, settings.max_length), strict=True):
            row_id = occurrences.key(content_digest(row))
            if isinstance(encoded, RowProblem):
                bad.add(source.where(row.line), str(encoded))
            else:
                for note in encoded.notes:
                    bad.note(source.where(row.line), note)
                yield row, encoded, row_id


def _bad_rows(report: Report) -> BadRows:
    return BadRows(report.path, report.seen, report.bad, examples=list(report.examples))


# --------------------------------------------------------------------------------------------------------------- poison


def mix_poison(dataset: TokenDataset, poison: TokenDataset, ratio: float, seed: int = 0) -> TokenDataset:
    """Add poisoned rows to the data set, so that they make up `ratio` of all rows.

    The choice of poisoned rows depends on (seed, row) alone: a larger ratio takes the same rows and more. Where there
    are too few, rows are taken several times. TaskOrder decides their places in an epoch.

    Raises: DataError where there are no poisoned rows.
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
