"""The readers of safecl's own formats, each as a function of bytes, for fuzzing (benchmarks/faults/fuzz.py) and for the
test that reads the kept inputs again.

Where a hash protects the bytes it is put right first; otherwise nothing behind it would be reached. A reader may refuse
by one of its own errors; anything else is a finding.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import xxhash

from safecl.config import ConfigError
from safecl.replay import ReplayError
from safecl.storage.durable import DamagedCheckpoint
from safecl.storage.temporary import temporary_folder

REFUSALS = (ConfigError, ReplayError, DamagedCheckpoint)
_FOLDER = temporary_folder("fuzz", REFUSALS[0])


def _file(name: str, data: bytes) -> Path:
    path = _FOLDER / name
    path.write_bytes(data)
    return path


def config(data: bytes) -> None:
    from safecl.config import load_config

    load_config(_file("run.yaml", data))


def override(data: bytes) -> None:
    from safecl.config.parsing import apply_overrides

    apply_overrides({"train": {}, "tasks": [{"name": "a"}]}, [data.decode(errors="replace")])


def safetensors(data: bytes) -> None:
    from safecl.storage.safetensors_file import read_header

    read_header(_file("x.safetensors", data))


def model_json(data: bytes) -> None:
    from safecl.storage.untrusted import read_json

    read_json(_file("config.json", data))


def slices(data: bytes) -> None:
    from safecl.engine.checkpoint.format import read_slices

    read_slices(_file("rank-00000.safetensors", data))


def manifest(data: bytes) -> None:
    from safecl.engine.checkpoint.format import read_manifest

    _file("manifest.json", xxhash.xxh3_128_hexdigest(data).encode() + b"\n" + data)
    read_manifest(_FOLDER)


def memory_index(data: bytes) -> None:
    from safecl.replay.files.table import load_index

    load_index(memoryview(data + xxhash.xxh3_128_digest(data)), "memory.index")


def segment(data: bytes) -> None:
    from safecl.replay.files.segments import HEADER_BYTES, read_header, scan

    path = _file("segment", data)
    read_header(path)
    if len(data) >= HEADER_BYTES:
        scan(memoryview(data), path)


def block(data: bytes) -> None:
    """A block whose own checksums are right."""
    from safecl.replay.files import segments

    size = segments._BLOCK.size
    if len(data) < size:
        return
    table = xxhash.xxh3_64_intdigest(data[size:])
    head = bytearray(data[: size - 8])
    head[:8] = segments._BLOCK_MAGIC
    head[-16:-8] = table.to_bytes(8, "little")
    whole = bytes(head) + xxhash.xxh3_64_digest(bytes(head)) + data[size:]
    segments.scan(memoryview(b"\0" * segments.HEADER_BYTES + whole), Path("segment"))


def row(data: bytes) -> None:
    from safecl.replay.files.codec import decode

    if len(data) < 4:
        return
    try:
        decode(memoryview(data[4:]), *data[:4])
    except (ValueError, RecursionError) as error:  # the readers of rows turn it into ReplayError
        raise ReplayError(str(error)) from None


def cache_header(data: bytes) -> None:
    from safecl.replay.cache import _NAME, CacheHeader, _hash

    try:
        values = json.loads(data)
        if isinstance(values, dict):
            data = json.dumps(values | {"hash": _hash({k: v for k, v in values.items() if k != "hash"})}).encode()
    except (ValueError, RecursionError):
        pass
    _file(_NAME, data)
    CacheHeader.read(_FOLDER)


def fisher(data: bytes) -> None:
    from safecl.engine.fisher.file import open_fisher

    open_fisher(_file("fisher.safetensors", data))


def arrays(data: bytes) -> None:
    from safecl.storage.durable import read_arrays

    read_arrays(_file("scores.npz", data), ("values", "counts"))


def mapped_array(data: bytes) -> None:
    from safecl.storage.durable import map_array

    map_array(_file("index.npy", data))


def rows_jsonl(data: bytes) -> None:
    _rows("rows.jsonl", data)


def rows_json(data: bytes) -> None:
    _rows("rows.json", data)


def rows_csv(data: bytes) -> None:
    _rows("rows.csv", data)


def _rows(name: str, data: bytes) -> None:
    from safecl.data.reading.files import open_source

    for number, _ in enumerate(open_source(_file(name, data)).rows()):
        if number > 1000:
            return


READERS: dict[str, Callable[[bytes], None]] = {
    function.__name__: function
    for function in (config, override, safetensors, model_json, slices, manifest, memory_index, segment, block, row,
                     cache_header, fisher, arrays, mapped_array, rows_jsonl, rows_json, rows_csv)
}  # fmt: skip


def read(name: str, data: bytes) -> bool:
    """Whether a reader accepts the bytes. Other errors than refusals pass."""
    try:
        READERS[name](data)
    except REFUSALS:
        return False
    return True


# --------------------------------------------------------------------------------------------------------------- seeds


def seeds(name: str) -> list[bytes]:
    """Sound bytes of a format, to begin with."""
    return {
        "config": _config_seeds, "override": lambda: [b"train.seed=3", b"tasks.0.name=b", b"a.b={c: [1, 2e-5]}"],
        "safetensors": _safetensors_seeds, "slices": _safetensors_seeds, "fisher": _fisher_seeds,
        "model_json": lambda: [b'{"a": [1, {"b": null}]}'], "manifest": _manifest_seeds, "memory_index": _index_seeds,
        "arrays": _arrays_seeds, "mapped_array": _mapped_array_seeds,
        "segment": _segment_seeds, "block": _block_seeds, "row": _row_seeds, "cache_header": _cache_seeds,
        "rows_jsonl": lambda: [b'{"prompt": "a", "completion": "b"}\n{"text": "c"}\n'],
        "rows_json": lambda: [b'[{"prompt": "a", "completion": "b"}]'],
        "rows_csv": lambda: [b'prompt,completion\n"a, b","c ""d"""\n'],
    }[name]()  # fmt: skip


def _config_seeds() -> list[bytes]:
    text = "model: {path: m}\ntasks: [{name: t, train: t.jsonl}]\nmemory: {source: s}\noutput: out\n"
    return [text.encode(), (text + "train: {learning_rate: 2e-5, betas: [0.9, 0.999]}\nmethods: balanced\n").encode()]


def _safetensors_seeds() -> list[bytes]:
    from safecl.storage.safetensors_file import header_bytes

    return [header_bytes({"weights|a|0": ("F32", [3]), "ema|b|4": ("BF16", [2])}, {"random": "{}"}) + bytes(16)]


def _fisher_seeds() -> list[bytes]:
    from safecl.engine.fisher.file import _DTYPE, _KEY, FisherHeader
    from safecl.storage.safetensors_file import header_bytes

    types = {"int": 1, "float": 0.5, "str": "x", "bool": False}
    values = {name: types.get(str(kind), 1) for name, kind in FisherHeader.__annotations__.items()}
    return [header_bytes({"a": (_DTYPE, [4])}, {_KEY: json.dumps(values)}) + bytes(8)]


def _manifest_seeds() -> list[bytes]:
    from safecl.engine.checkpoint.format import Manifest, Reference, dump_manifest
    from safecl.storage.durable import FileRecord

    files = {"rank-00000.safetensors": FileRecord(3, "0" * 32)}
    kinds, references = {"weights": "F32"}, {"anchor": Reference("m", "d", "F32")}
    whole = dump_manifest(Manifest(_FOLDER.name, 3, 1, files, {"a": (3,)}, kinds, references))
    return [whole.partition(b"\n")[2]]


def _arrays_seeds() -> list[bytes]:
    from safecl.storage.durable import write_arrays

    path = _FOLDER / "seed.npz"
    write_arrays(path, {"values": np.arange(3, dtype=np.float32), "counts": np.array([1, 2], np.int32)})
    return [path.read_bytes()]


def _mapped_array_seeds() -> list[bytes]:
    np.save(_FOLDER / "seed.npy", np.arange(6).reshape(2, 3))
    return [(_FOLDER / "seed.npy").read_bytes()]


def _index_seeds() -> list[bytes]:
    from safecl.replay.files.table import COLUMNS, RowTable, dump_index

    table = RowTable({name: np.zeros(3, dtype) for name, dtype in COLUMNS.items()})
    return [bytes(dump_index({"seed": 1}, table))[:-16]]


def _memory_files() -> list[bytes]:
    from safecl.replay import ReplayBuffer
    from tests.replay import samples

    with tempfile.TemporaryDirectory() as folder:
        buffer = ReplayBuffer(samples.config(capacity=50), folder, seed=0, rank=0, world_size=1)
        buffer.insert([samples.with_teacher(row) for row in samples.rows(4)])
        buffer.close()
        return [path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()]


def _segment_seeds() -> list[bytes]:
    return [data for data in _memory_files() if data[:8] == b"SAFECLSG"]


def _block_seeds() -> list[bytes]:
    from safecl.replay.files.segments import HEADER_BYTES

    return [data[HEADER_BYTES:] for data in _segment_seeds()]


def _row_seeds() -> list[bytes]:
    body = np.arange(5, dtype="<i4").tobytes() + b"\x16" + b'{"a": "bcde"}' + b" " * 2
    return [bytes([5, 3, 0, 0]) + body, bytes([5, 3, 1, 2]) + body * 3]


def _cache_seeds() -> list[bytes]:
    from dataclasses import fields

    from safecl.replay.cache import CacheHeader

    types = {"int": 1, "float": 0.5, "str": "x", "bool": False}
    values = {each.name: types.get(str(each.type), "x") for each in fields(CacheHeader)}
    return [json.dumps(values).encode(), json.dumps(asdict(CacheHeader(**values))).encode()]
