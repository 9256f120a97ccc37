"""The cache of teacher outputs: the aligned model's outputs on each row, computed once for all runs on that model.

    folder/cache.json          the settings that the outputs were made with (CacheHeader), with a hash of its own
    folder/cache-...segment    outputs by row_id, in the replay buffer's segments: append-only, checksums on every byte
    memory/outputs.json        the path of the cache that holds the outputs of a memory's rows

At k = 64 an entry takes 64 x (2 + 4) + 4 = 388 bytes a token, and 56 to 63 more per row. Log-probabilities are stored
in fp16 (0.4 % error of the gradient near the teacher, against 3 % in bf16 and 8 % for fp16 logits), the log of the
remaining mass in fp32. Any number of ranks can write at the same time. A build that was stopped resumes where it was,
on any number of ranks.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from safecl.config import ConfigError
from safecl.replay.files import codec
from safecl.replay.files.hashing import name_key
from safecl.replay.files.persistence import LabelBook, find_blocks, rows_found
from safecl.replay.files.store import CACHE, SegmentFolder, shards_of_rank
from safecl.replay.files.table import RowTable
from safecl.replay.rows import ReplayError, TeacherOutputs
from safecl.storage.durable import sync_folder

FORMAT_VERSION = 1
_NAME, LINK = "cache.json", "outputs.json"
# Rows of a cache replace nothing, however many writers there were.
_NO_START = 2**64 - 1


@dataclass(frozen=True)
class CacheHeader:
    """The settings that outputs were made with; all must agree where the outputs are used.

    model, tokenizer: hashes. vocab_size: width of the model's logits. k: entries per token. temperature: that of the
    stored distribution. dtype: that of the log-probabilities, `fp16`. indices: `int32` or `packed`. model_dtype: that
    of the model's forward pass. max_tokens: length that rows were cut to, 0 for uncut rows.
    """

    model: str
    tokenizer: str
    vocab_size: int
    k: int = 64
    temperature: float = 1.0
    dtype: str = "fp16"
    indices: str = "int32"
    model_dtype: str = "fp32"
    max_tokens: int = 0
    format_version: int = FORMAT_VERSION

    def check(self, expected: CacheHeader, where: str | Path) -> None:
        """Raise ConfigError naming every field that differs, with both values."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(expected)
        differing = [
            f"{name} {mine[name]} in the cache, {theirs[name]} in this run"
            for name in mine
            if mine[name] != theirs[name]
        ]
        if differing:
            raise ConfigError(
                f"{where}: made with other settings: {'; '.join(differing)}; build it anew in another folder"
            )

    @property
    def identity(self) -> int:
        """64-bit hash of the settings."""
        return name_key(json.dumps(dataclasses.asdict(self), sort_keys=True))

    def write(self, folder: Path) -> None:
        """Publish the header by rename; several ranks may do so at once."""
        values = dataclasses.asdict(self)
        text = json.dumps({**values, "hash": _hash(values)}, indent=2)
        temporary = folder / f"{_NAME}.{os.getpid()}.{threading.get_ident()}"
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(folder / _NAME)
            sync_folder(folder)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise ReplayError(f"{folder / _NAME}: {error.strerror}") from None

    @classmethod
    def read(cls, folder: Path) -> CacheHeader:
        """Read the header. Raises ConfigError where there is no cache, ReplayError where the header is damaged."""
        path = folder / _NAME
        try:
            values = json.loads(path.read_bytes())
            digest = values.pop("hash")
        except FileNotFoundError:
            raise ConfigError(
                f"{folder}: no cache of teacher outputs in this folder; `safecl memory cache CFG` builds one"
            ) from None
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise ReplayError(f"{path}: the header is damaged") from None
        if digest != _hash(values):
            raise ReplayError(f"{path}: the header is damaged (its hash does not match)")
        if (version := values.get("format_version")) != FORMAT_VERSION:
            raise ReplayError(f"{path}: format version {version}, this safecl reads version {FORMAT_VERSION}")
        try:
            return cls(**values)
        except TypeError:
            raise ReplayError(f"{path}: not a header that this safecl wrote") from None


def _hash(values: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())


class _Outputs:
    """The outputs in a folder's segments, by row_id."""

    def __init__(self, store: SegmentFolder):
        self.store = store
        blocks, self.problems = find_blocks(store, store.on_disk(), {}, check_bodies=False)
        self.table: RowTable = rows_found(blocks, store, LabelBook(), 0)[0]

    def has(self, row_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return which rows have outputs here; bool per row_id."""
        return np.isin(np.asarray(row_ids, np.uint64), self.table["position"])


class CacheWriter:
    """Adds outputs to a cache, which it creates where there is none. Ranks can write at the same time; rows that are in
    the cache need not be added again.

    Raises ConfigError where the folder was made with another header (both values are named), BufferInUse where another
    process writes this rank's shards, ReplayError where a write fails.
    """

    def __init__(self, folder: str | Path, header: CacheHeader, *, rank: int = 0, world_size: int = 1):
        self.folder, self.header = Path(folder), header
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / _NAME).exists():
            CacheHeader.read(self.folder).check(header, self.folder)
        else:
            header.write(self.folder)
        self._index_code = codec.index_form(header.vocab_size, header.indices == "packed")
        self._store = SegmentFolder(self.folder, CACHE, header.identity, shards_of_rank(rank, world_size))
        self._store.start = _NO_START
        try:
            self._outputs = _Outputs(self._store)
        except BaseException:
            self._store.close()
            raise

    def has(self, row_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return which rows had outputs, from any rank, when the writer was opened; bool per row_id."""
        return self._outputs.has(row_ids)

    def add(
        self, row_ids: Iterable[int], outputs: Iterable[TeacherOutputs], nlls: Iterable[float] | None = None
    ) -> None:
        """Write the outputs of some rows: all of them, or none where the write fails.

        nlls: mean NLL of each row's targets under the same model, nats per token at temperature 1. Raises ValueError
        for outputs that do not fit.
        """
        row_ids, outputs = list(row_ids), list(outputs)
        checked = [self._checked(row_id, one) for row_id, one in zip(row_ids, outputs, strict=True)]
        bodies = [codec.encode(None, None, one, self._index_code, b"") for one in checked]
        entries = np.zeros(len(row_ids), codec.ENTRY)
        entries["position"] = entries["row_id"] = row_ids
        entries["checksum"] = [codec.checksum(row_id, body) for row_id, body in zip(row_ids, bodies, strict=True)]
        entries["nbytes"] = [len(body) for body in bodies]
        entries["targets"] = [len(one.log_tail) for one in checked]
        entries["width"], entries["prior_nll"] = self.header.k, np.nan if nlls is None else list(nlls)
        entries["form"] = [codec.teacher_form(one, self._index_code)[0] for one in checked]
        self._store.append([["", "", ""]], entries, bodies, 0)

    def _checked(self, row_id: int, outputs: TeacherOutputs) -> TeacherOutputs:
        if outputs.log_probs.dtype != np.float16 or outputs.log_probs.shape[1:] != (self.header.k,):
            shape, dtype = list(outputs.log_probs.shape), outputs.log_probs.dtype
            raise ValueError(
                f"outputs of row {row_id}: log_probs {shape} {dtype}; this cache holds fp16 [targets, {self.header.k}]"
            )
        if outputs.indices.size and int(outputs.indices.max()) >= self.header.vocab_size:
            largest = int(outputs.indices.max())
            raise ValueError(f"outputs of row {row_id}: token {largest} in a vocabulary of {self.header.vocab_size}")
        return codec.checked_teacher(outputs, len(outputs.log_tail))

    def flush(self) -> None:
        """Return when everything added is on disk."""
        self._store.sync()

    def close(self) -> None:
        """Flush and release the shards."""
        self._store.close()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class CacheReader:
    """Reads a cache. With ReplayBuffer(teacher_of=reader.get) a run shares the outputs instead of copying them.

    Raises ConfigError where the header differs from `expected` (both values are named) or there is none, ReplayError
    where it is damaged.
    """

    def __init__(self, folder: str | Path, expected: CacheHeader | None = None):
        self.folder = Path(folder)
        self.header = CacheHeader.read(self.folder)
        if expected is not None:
            self.header.check(expected, self.folder)
        self._outputs = _Outputs(SegmentFolder(self.folder, CACHE, self.header.identity, writable=False))
        self.problems = self._outputs.problems

    def __len__(self) -> int:
        return len(self._outputs.table)

    def has(self, row_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return which rows have outputs here; bool per row_id."""
        return self._outputs.has(row_ids)

    def __contains__(self, row_id: int) -> bool:
        try:
            self._outputs.table.find_one(row_id)
        except KeyError:
            return False
        return True

    def row_ids(self) -> np.ndarray:
        """Return the row_ids of all rows, uint64 [rows], sorted."""
        return self._outputs.table["position"]

    def require(self, row_ids: Sequence[int] | np.ndarray) -> None:
        """Raise ReplayError where outputs of these rows are missing. Other nodes may have written them into a folder of
        their own."""
        if missing := int((~self.has(row_ids)).sum()):
            lost = f"the outputs of {missing:,} of {len(row_ids):,} rows are not here"
            raise ReplayError(f"{self.folder}: {lost}; several nodes need a folder that they share")

    def prior_nll(self, row_id: int) -> float:
        """Return the mean NLL of the row's targets under the model, nats per token; NaN where it was not stored.
        Raises KeyError."""
        return float(self._outputs.table["prior_nll"][self._outputs.table.find_one(row_id)])

    def get(self, row_id: int, num_targets: int | None = None) -> TeacherOutputs:
        """Return the outputs of a row, or of its first `num_targets` supervised tokens (a memory may keep a prefix).
        The arrays are read-only views of the file.

        Raises KeyError where the row is not there or has fewer targets, ReplayError where it is damaged.
        """
        table = self._outputs.table
        row = table.find_one(row_id)
        names = ("segment", "offset", "nbytes", "checksum", "targets", "form", "width")
        segment, offset, nbytes, digest, targets, form, width = (int(table[name][row]) for name in names)
        body = self._outputs.store.read(segment, offset, nbytes)
        if codec.checksum(row_id, body) != digest:
            where = f"{self.folder / self._outputs.store.name(segment)}: outputs of row {row_id} at byte {offset}"
            raise ReplayError(f"{where} are damaged; remove {self.folder}, and they are computed again")
        if num_targets is not None and num_targets > targets:
            here = f"the cache has {targets} targets of row {row_id}, not {num_targets}"
            raise KeyError(f"{here}; was it built with other masks?")
        outputs = codec.decode(body, 0, targets, form, width)[2]
        assert outputs is not None, "a cache holds rows with outputs only"
        return outputs if num_targets is None else codec.first_targets(outputs, num_targets)

    def verify(self) -> list[str]:
        """Read every byte. Returns what is damaged, one line each."""
        names = self._outputs.store.on_disk()
        return list(dict.fromkeys([*self.problems, *find_blocks(self._outputs.store, names, {})[1]]))


# ----------------------------------------------------------------------------------------- a memory that shares a cache


class SharedOutputs:
    """The outputs of a memory's rows in a shared cache, for ReplayBuffer(teacher_of=...).

    The cache is opened when the first row is read. That is an error where the cache is gone, was rebuilt with other
    settings, or is damaged.
    """

    def __init__(self, cache: Path, header: CacheHeader):
        self.cache, self.header = cache, header
        self._reader: CacheReader | None = None

    @property
    def reader(self) -> CacheReader:
        """The open cache."""
        if self._reader is None:
            if not (self.cache / _NAME).exists():
                hint = "`safecl memory cache` builds them again"
                raise ReplayError(f"{self.cache}: the teacher outputs of this memory's rows are gone; {hint}")
            self._reader = CacheReader(self.cache, self.header)
        return self._reader

    def __call__(self, row_id: int, num_targets: int) -> TeacherOutputs | None:
        """Return the outputs of a row's first targets; None for rows that the cache does not hold."""
        return self.reader.get(row_id, num_targets) if row_id in self.reader else None

    def link(self, folder: Path) -> None:
        """Write into a memory's folder where its outputs are, for `of`."""
        text = json.dumps({"cache": str(self.cache.absolute()), "header": dataclasses.asdict(self.header)}, indent=1)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / LINK).write_text(text, encoding="utf-8")
        except OSError as error:
            raise ReplayError(f"{folder / LINK}: {error.strerror}") from None

    @classmethod
    def of(cls, folder: Path) -> SharedOutputs | None:
        """Return the shared outputs that a memory's folder names; None where it names none. Raises ReplayError."""
        try:
            values = json.loads((folder / LINK).read_text(encoding="utf-8"))
            return cls(Path(values["cache"]), CacheHeader(**values["header"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise ReplayError(
                f"{folder / LINK}: cannot be read; it names the cache of this memory's teacher outputs"
            ) from None
