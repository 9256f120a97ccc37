"""Export and import of a memory as a table: Parquet or Arrow files with the columns below, without loss.

    key, row_id int64 | source, task string | step int32 | tags string (JSON) | prior_nll float32
    | input_ids list<int32> | loss_mask list<bool> | text string (with a tokenizer)
    | with stored outputs: teacher_kind string (topk), teacher_dtype string, teacher_values list<list<float32>>
      (log-probabilities), teacher_indices list<list<int32>>, teacher_log_tail list<float32>

`datasets.load_dataset("parquet", data_files=...)`, pandas, polars and DuckDB read them as they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from safecl.config import ConfigError
from safecl.data.tokens import Row
from safecl.replay.buffer import ReplayBuffer
from safecl.replay.rows import MemoryRow, ReplayError, TeacherOutputs

SUFFIXES = (".parquet", ".arrow")
_TOPK = "topk"
_CHUNK_TOKENS = 100_000


def _features(with_text: bool, with_teacher: bool) -> Any:
    from datasets import Features, Sequence, Value

    features = {
        "key": Value("int64"),
        "row_id": Value("int64"),
        "source": Value("string"),
        "task": Value("string"),
        "step": Value("int32"),
        "tags": Value("string"),
        "prior_nll": Value("float32"),
        "input_ids": Sequence(Value("int32")),
        "loss_mask": Sequence(Value("bool")),
    }
    if with_text:
        features["text"] = Value("string")
    if with_teacher:
        features |= {
            "teacher_kind": Value("string"),
            "teacher_dtype": Value("string"),
            "teacher_values": Sequence(Sequence(Value("float32"))),
            "teacher_indices": Sequence(Sequence(Value("int32"))),
            "teacher_log_tail": Sequence(Value("float32")),
        }
    return Features(features)


# --------------------------------------------------------------------------------------------------------------- export


def export_rows(buffer: ReplayBuffer, path: str | Path, decode: Callable[[list[int]], str] | None = None) -> int:
    """Write all rows to a .parquet or .arrow file, published by rename. Returns the number of rows. decode(ids) gives
    the `text` column.

    Raises ConfigError for another suffix, ReplayError for damaged rows or a failed write.
    """
    path = Path(path)
    _check_suffix(path)
    keys = buffer.keys()
    with_teacher = buffer.teacher_of is not None or bool((buffer.table["form"] != 0).any())
    schema = _features(decode is not None, with_teacher).arrow_schema
    temporary = path.with_name(path.name + ".writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _writer(temporary, path.suffix, schema) as writer:
            for part in _portions(buffer, keys):
                writer.write_table(_table(part, buffer.get_many(part), schema, decode))
        temporary.rename(path)
    except OSError as error:
        raise ReplayError(f"{path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return len(keys)


def _check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: the format follows from the suffix, which must be one of {', '.join(SUFFIXES)}")


def _writer(path: Path, suffix: str, schema: pa.Schema) -> contextlib.AbstractContextManager[Any]:
    if suffix == ".parquet":
        return pa.parquet.ParquetWriter(path, schema, compression="zstd")
    return pa.ipc.new_stream(str(path), schema)  # the format in which `datasets` stores data


def _portions(buffer: ReplayBuffer, keys: list[int]) -> Iterator[list[int]]:
    """Split the keys into portions of about as many tokens, so that memory does not grow with the number of rows."""
    number = np.cumsum(buffer.lengths(keys)) // _CHUNK_TOKENS if keys else np.zeros(0)
    for part in np.split(np.asarray(keys), np.flatnonzero(np.diff(number)) + 1):
        if len(part):
            yield part.tolist()


def _table(
    keys: list[int], rows: list[MemoryRow], schema: pa.Schema, decode: Callable[[list[int]], str] | None
) -> pa.Table:
    columns: dict[str, Any] = {
        "key": keys,
        "row_id": [row.row.row_id for row in rows],
        "source": [row.source for row in rows],
        "task": [row.task for row in rows],
        "step": [row.step for row in rows],
        "tags": [json.dumps(dict(row.tags), ensure_ascii=False) for row in rows],
        "prior_nll": [None if np.isnan(row.prior_nll) else row.prior_nll for row in rows],
        "input_ids": _lists([row.row.input_ids for row in rows]),
        "loss_mask": _lists([row.row.loss_mask for row in rows]),
    }
    if decode is not None:
        columns["text"] = [decode(row.row.input_ids.tolist()) for row in rows]
    if "teacher_kind" in schema.names:
        columns |= _teacher_columns([row.teacher for row in rows])
    arrays = [
        column if isinstance(column, pa.Array) else pa.array(column, schema.field(n).type)
        for n, column in columns.items()
    ]
    return pa.table(dict(zip(columns, arrays, strict=True))).cast(schema)


def _lists(arrays: list[np.ndarray]) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(np.concatenate(arrays)))


def _nested(arrays: list[np.ndarray], dtype: pa.DataType) -> pa.Array:
    """Convert arrays [n, width] to lists of lists."""
    widths = np.repeat([array.shape[1] for array in arrays], [len(array) for array in arrays])
    flat = np.concatenate([array.reshape(-1) for array in arrays]).astype(dtype.to_pandas_dtype())
    inner = pa.ListArray.from_arrays(
        pa.array(np.concatenate([[0], np.cumsum(widths)]), pa.int32()), pa.array(flat, dtype)
    )
    return pa.ListArray.from_arrays(
        pa.array(np.concatenate([[0], np.cumsum([len(array) for array in arrays])]), pa.int32()), inner
    )


def _teacher_columns(teachers: list[TeacherOutputs | None]) -> dict[str, Any]:
    none = np.zeros((0, 0), np.float32)
    return {
        "teacher_kind": [None if t is None else _TOPK for t in teachers],
        "teacher_dtype": [None if t is None else str(t.log_probs.dtype) for t in teachers],
        "teacher_values": _nested([none if t is None else t.log_probs for t in teachers], pa.float32()),
        "teacher_indices": _nested([none if t is None else t.indices for t in teachers], pa.int32()),
        "teacher_log_tail": _lists([none[:, 0:0].reshape(-1) if t is None else t.log_tail for t in teachers]),
    }


# --------------------------------------------------------------------------------------------------------------- import


def read_table(path: str | Path) -> Iterator[MemoryRow]:
    """Read the rows of a .parquet or .arrow file with these columns; only input_ids and loss_mask are required.

    Raises ConfigError naming the file and what is missing, or the row and what is wrong with it.
    """
    from datasets import load_dataset

    path = Path(path)
    _check_suffix(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        data = load_dataset(path.suffix[1:], data_files=str(path), split="train", streaming=True).with_format("arrow")
        number = 0
        for batch in data.iter(batch_size=256):
            for line in _rows(batch, path):
                yield _row(line, path, number)
                number += 1
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def _rows(batch: pa.Table, path: Path) -> Iterator[dict[str, Any]]:
    missing = [name for name in ("input_ids", "loss_mask") if name not in batch.column_names]
    if missing:
        raise ConfigError(f"{path}: the column {missing[0]!r} is missing; there are {', '.join(batch.column_names)}")
    columns = {name: batch[name] for name in batch.column_names if name not in ("key", "text")}
    for i in range(batch.num_rows):
        yield {name: column[i] for name, column in columns.items()}


def _array(value: Any, dtype: Any = None) -> np.ndarray:
    """Convert a list cell to an array, a list of lists to a matrix."""
    values = value.values
    if not pa.types.is_list(values.type) and not pa.types.is_large_list(values.type):
        return np.asarray(values.to_numpy(zero_copy_only=False), dtype)
    flat = np.asarray(values.flatten().to_numpy(zero_copy_only=False), dtype)
    return flat.reshape(len(values), -1) if len(values) else flat.reshape(0, 0)


def _row(line: dict[str, Any], path: Path, number: int) -> MemoryRow:
    def plain(name: str, default: Any) -> Any:
        value = line[name].as_py() if name in line else None
        return default if value is None else value

    try:
        ids, mask = _array(line["input_ids"]), _array(line["loss_mask"])
        digest = hashlib.blake2b(np.asarray(ids, np.int64).tobytes(), digest_size=8).digest()
        row_id = int(plain("row_id", int.from_bytes(digest, "little") >> 1))
        tags = json.loads(plain("tags", "{}"))
        if not isinstance(tags, dict):
            raise ValueError(f"tags are {tags!r}; write them as a JSON object")
        fields = plain("source", path.name), plain("task", ""), int(plain("step", 0)), tags
        return MemoryRow(Row(row_id, ids, mask), *fields, _teacher(line, plain), plain("prior_nll", float("nan")))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: row {number}: {error}") from None


def _teacher(line: dict[str, Any], plain: Callable[[str, Any], Any]) -> TeacherOutputs | None:
    kind = plain("teacher_kind", None)
    if kind is None:
        return None
    if kind != _TOPK:
        raise ValueError(f"teacher_kind {kind!r}; known is {_TOPK}")
    values = _array(line["teacher_values"]).astype(plain("teacher_dtype", "float16"))
    return TeacherOutputs(
        values, _array(line["teacher_indices"], np.int32), _array(line["teacher_log_tail"], np.float32)
    )
