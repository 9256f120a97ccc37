"""Copies what stands beside the weights: settings, tokenizer, chat template, generation config, and code."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safecl.merging.base import Unmergeable
from safecl.storage.durable import write_file

SETTINGS = "config.json"
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*.jinja",
)
_OTHERS = ("generation_config.json", "preprocessor_config.json", "processor_config.json")
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_CODE = ("*.py",)


def copy_beside(folder: Path, target: Path, *, changes: Mapping[str, Any], tokenizer: Path | None = None) -> None:
    """Copy the files of a model folder but its weights and its card.

    changes: keys of config.json that get another value. tokenizer: a folder whose tokenizer is taken instead, where it
    has one. Raises Unmergeable for a link that leads out of its folder, and OSError.
    """
    settings = json.loads(_content(folder, folder / SETTINGS))
    own_tokenizer = tokenizer if tokenizer is not None and any(_files(tokenizer, _TOKENIZER)) else folder
    patterns = [*_OTHERS, *_LICENCES, *(_CODE if settings.get("auto_map") else ())]
    _copy(own_tokenizer, _TOKENIZER, target)
    _copy(folder, tuple(patterns), target)
    if changes:
        write_file(target / SETTINGS, [(json.dumps({**settings, **changes}, indent=2) + "\n").encode()])
    else:
        write_file(target / SETTINGS, [_content(folder, folder / SETTINGS)])


def copy_tokenizer(folder: Path, target: Path) -> None:
    """Copy an adapter's tokenizer and chat template, where its folder has them. Raises as copy_beside."""
    _copy(folder, _TOKENIZER, target)


def _copy(source: Path, patterns: tuple[str, ...], target: Path) -> None:
    for file in _files(source, patterns):
        place = target / file.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        write_file(place, [_content(source, file)])


def _files(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    places = [*folder.glob("*"), *folder.glob("additional_chat_templates/*")]
    for path in sorted(places):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and any(fnmatchcase(name, pattern) for pattern in patterns):
            yield path


def _content(folder: Path, file: Path) -> bytes:
    """Read a file, but not through a link that leads out of its folder: the result would hold a file that is not the
    model's. The hub's cache is one folder of links."""
    root = folder.resolve()
    in_cache = root.parent.name == "snapshots"
    allowed = root.parent.parent if in_cache else root
    if not file.resolve().is_relative_to(allowed):
        raise Unmergeable(f"{file}: is a link to {file.resolve()}, outside of the model's folder; copy the file there")
    return file.read_bytes()
