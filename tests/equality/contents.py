"""The content of a folder's files, file by file, without what a clock or a machine's load decides."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

LOCKS = {"run.lock", "writer.lock", "build.lock", "models.lock"}
"""Files that say which process writes; they are left out."""
NAME_ONLY = {"report.html", "models.json"}
"""Files that hold times of the clock or of the file system throughout."""
CLOCK = {"finished", "seconds", "seconds_per_step"}
CLOCK_OF_A_STEP = {"memory_bytes", "time", "tokens_per_second"}
SEGMENTS = {".segment", ".index"}
GENERATION = re.compile(r"-\d{4}-(?=\d{5}\.segment$)")


def contents_of(folder: Path, below: Path, ranks: int = 1) -> dict[str, Any]:
    """Contents by path: trees for JSON and YAML, lists for JSON lines, hashes by tensor for safetensors, else one hash.

    An absolute path in a text loses its part up to the folder `below`. Which of several ranks begins its segments first
    is a race, so with `ranks` above 1 segments and their indices are told by their sizes.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in LOCKS)
    found = {}
    for path in files:
        name = str(path.relative_to(folder))
        if ranks > 1 and path.suffix in SEGMENTS:
            found[GENERATION.sub("-any-", name)] = f"{path.stat().st_size} bytes"
        else:
            found[name] = _content(path, str(below))
    return found


def _content(path: Path, below: str) -> Any:
    if path.name in NAME_ONLY:
        return "present"
    if path.suffix == ".safetensors":
        return dict(_tensors(path))
    data = path.read_bytes().replace(below.encode(), b"...")
    if path.name == "manifest.json":
        return _manifest(data)
    if path.suffix in (".json", ".yaml"):
        return _settled(yaml.safe_load(data) if path.suffix == ".yaml" else json.loads(data), CLOCK)
    if path.suffix == ".jsonl":
        return [_settled(json.loads(line), CLOCK_OF_A_STEP) for line in data.splitlines()]
    return _sha256(data)


def _manifest(data: bytes) -> Any:
    """Without sizes and hashes: a file that the manifest names holds the seconds that the run took."""
    tree = json.loads(data.partition(b"\n")[2])
    return tree | {"files": sorted(tree["files"])}


def _settled(value: Any, without: Iterable[str]) -> Any:
    if isinstance(value, dict):
        return {key: _settled(inner, without) for key, inner in value.items() if key not in without}
    return [_settled(inner, without) for inner in value] if isinstance(value, list) else value


def _tensors(path: Path) -> Iterator[tuple[str, str]]:
    """(name, dtype, shape and hash of its bytes), and hashes of the metadata, which hold a rank's random states."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    for name, text in sorted(header.pop("__metadata__", {}).items()):
        yield f"metadata {name}", _sha256(text.encode())
    for name in sorted(header):
        first, last = header[name]["data_offsets"]
        yield name, f"{header[name]['dtype']} {header[name]['shape']} {_sha256(data[begin + first : begin + last])}"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
