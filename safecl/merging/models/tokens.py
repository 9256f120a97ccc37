"""Compares tokenizers: a token must have one id in all models, or the rows of their embeddings are not those of one
token."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from safecl.storage.untrusted import UnusableWeights

FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model", "vocab.txt")
MAX_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Tokens:
    """A tokenizer's tokens.

    tokens: the token of each id; empty where the file's form is not read, as sentencepiece's. digest: hash of the file.
    """

    file: Path
    digest: str
    tokens: Mapping[int, str]


def read_tokens(folder: Path) -> Tokens | None:
    """Read the tokenizer in a folder; None where it has none. Raises UnusableWeights where it is damaged."""
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        return None
    if file.stat().st_size > MAX_BYTES:
        raise UnusableWeights(f"{file}: {file.stat().st_size:,} bytes long, which no tokenizer is")
    content = file.read_bytes()
    digest = xxhash.xxh3_128_hexdigest(content)
    if file.suffix != ".json":
        return Tokens(file, digest, {})
    try:
        return Tokens(file, digest, _tokens(json.loads(content), file))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UnusableWeights(f"{file}: is not a tokenizer ({type(error).__name__}: {error})") from None


def _tokens(content: Mapping[str, Any], file: Path) -> dict[int, str]:
    if file.name == "vocab.json":
        return {int(place): str(token) for token, place in content.items()}
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, Mapping):
        found = {int(place): str(token) for token, place in vocabulary.items()}
    else:
        found = {place: str(entry[0]) for place, entry in enumerate(vocabulary)}
    return found | {int(added["id"]): str(added["content"]) for added in content.get("added_tokens") or ()}


def difference(first: Tokens, other: Tokens) -> str | None:
    """Describe the first id that is another token in the other tokenizer; None where all common ids agree."""
    if first.digest == other.digest:
        return None
    if not first.tokens or not other.tokens:
        return f"{first.file.name} and {other.file.name} differ"
    differing = [
        place for place in first.tokens.keys() & other.tokens.keys() if first.tokens[place] != other.tokens[place]
    ]
    if not differing:
        return None
    place = min(differing)
    more = f", and {len(differing) - 1} more differ" if len(differing) > 1 else ""
    return f"id {place} is {other.tokens[place]!r} there and {first.tokens[place]!r} in {first.file.parent}{more}"
