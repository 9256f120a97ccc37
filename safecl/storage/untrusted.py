"""Looks at a model folder before a library reads it: what lies outside of it, is no plain file, or would never be read
to its end, is refused by name. Imports no torch.

A link is followed only within the folder, and in the hub's cache, whose snapshots are links to its blobs.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safecl.config import ConfigError
from safecl.config.texts import visible

LARGEST_JSON = 64 * 2**20
LARGEST_TEXT_FILE = 512 * 2**20
"""Largest tokenizer, vocabulary and template. The largest known tokenizers have 40 MB."""
MOST_NESTED = 64
_READ = (".json", ".jinja", ".txt", ".model", ".safetensors", ".bin", ".py", ".tiktoken", ".gguf")
_WEIGHTS = (".safetensors", ".bin", ".gguf")
_LARGE_JSON = ("tokenizer.json", "vocab.json")
"""Files that Rust reads, whose reader has limits of its own."""


class UnusableWeights(ConfigError):
    """A model's weights cannot be used; the message names the file and what is wrong."""


def library_error(error: BaseException) -> str:
    """Say in one line what a library's error means. Advice to run code, or to unpickle it, is left out."""
    text = visible(str(error).strip())
    if type(error).__name__ == "UnpicklingError" or "weights_only" in text or "WeightsUnpickler" in text:
        return (
            "it is a pickle that holds more than tensors, and to read it could run code; "
            "save the model as safetensors where it came from"
        )
    if "trust_remote_code" in text or "custom code" in text:
        return (
            "it needs code that comes with it, which does not run; "
            "model.trust_remote_code: true runs it, with all your rights, so read it first"
        )
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    return text.splitlines()[0][:300] if text else type(error).__name__


def code_of(folder: Path) -> list[str]:
    """Return the names of a model folder's Python files."""
    return sorted(file.name for file in folder.glob("*.py"))


def inside(folder: Path, name: str) -> Path:
    """Return the place of a file that an index of the folder names. Raises UnusableWeights where it is outside."""
    if "\0" in name or len(name) > 4000:
        raise UnusableWeights(f"{folder}: names the file {visible(name[:80])!r}, which cannot exist")
    file = folder / name
    refuse_outside(folder, file)
    return file


def refuse_outside(folder: Path, file: Path) -> None:
    """Raise UnusableWeights where a file of the folder is a link that leads out of it."""
    real, home = Path(os.path.realpath(file)), Path(os.path.realpath(_home_of(folder)))
    if not real.is_relative_to(home):
        raise UnusableWeights(
            f"{visible(os.fspath(file))} leads to {visible(os.fspath(real))}, outside of the folder; "
            "it must hold all its files: copy the file there, or name the other folder"
        )


def _home_of(folder: Path) -> Path:
    """The folder itself; for a snapshot in the hub's cache, the folder with its blobs."""
    is_snapshot = folder.parent.name == "snapshots" and (folder.parent.parent / "blobs").is_dir()
    return folder.parent.parent if is_snapshot else folder


def check_folder(folder: Path) -> None:
    """Look at all files of a model folder that a library may read. Raises UnusableWeights."""
    for file in _files(folder):
        refuse_outside(folder, file)
        try:
            found = os.stat(file)
        except OSError as error:
            raise UnusableWeights(f"{file}: {error.strerror}") from None
        if not stat.S_ISREG(found.st_mode):
            raise UnusableWeights(f"{file}: not a plain file")
        if file.suffix in _WEIGHTS:
            continue
        if found.st_size > LARGEST_TEXT_FILE:
            raise UnusableWeights(f"{file}: {found.st_size:,} bytes long, {LARGEST_TEXT_FILE:,} at most are read")
        if file.suffix == ".json" and file.name not in _LARGE_JSON:
            read_json(file)


def text_files(folder: Path) -> list[Path]:
    """Return all files of a model folder that a library may read, without those of weights."""
    return [file for file in _files(folder) if file.suffix not in _WEIGHTS]


def _files(folder: Path) -> Iterator[Path]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        if path.suffix in _READ:
            yield path
        elif path.name == "additional_chat_templates" and path.is_dir():
            yield from _files(path)


def read_json(file: Path) -> Any:
    """Read a JSON file of a model. Raises UnusableWeights for one that is too large, nested too deep, or no JSON."""
    try:
        with file.open("rb") as opened:
            content = opened.read(LARGEST_JSON + 1)
    except OSError as error:
        raise UnusableWeights(f"{file}: {error.strerror}") from None
    if len(content) > LARGEST_JSON:
        raise UnusableWeights(f"{file}: more than {LARGEST_JSON:,} bytes long")
    return json_of(content, file)


def json_of(content: bytes, file: Path | str) -> Any:
    """Parse JSON that `file` holds. Raises UnusableWeights for what is nested too deep, or no JSON."""
    try:
        value = json.loads(content)
    except RecursionError:
        raise UnusableWeights(f"{file}: nested more than {MOST_NESTED} deep") from None
    except ValueError as error:  # also a number of more digits than Python reads
        if _is_deep(content):
            raise UnusableWeights(f"{file}: nested more than {MOST_NESTED} deep") from None
        raise UnusableWeights(f"{file}: not JSON: {visible(str(error).partition(';')[0][:200])}") from None
    _refuse_deep(value, file)
    return value


def _is_deep(content: bytes) -> bool:
    return (
        content.count(b"[") + content.count(b"{") > 10 * MOST_NESTED and content.count(b"]") + content.count(b"}") < 9
    )


def _refuse_deep(value: Any, file: Path | str) -> None:
    level = [value]
    for _ in range(MOST_NESTED):
        level = [part for item in level if isinstance(item, (dict, list)) for part in _parts(item)]
        if not level:
            return
    raise UnusableWeights(f"{file}: nested more than {MOST_NESTED} deep")


def _parts(item: Any) -> Iterator[Any]:
    return iter(item.values() if isinstance(item, dict) else item)
