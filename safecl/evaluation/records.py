"""Records of answers: outputs/*.jsonl, one record per prompt, so that another judge can read them later.

An `answer` is the text behind header and thought. Where that is not all, `raw` is the whole generated text; `cut_off`
is true where it ends in its thought, and the answer's marks are then null.

`privacy.examples` governs the texts (prompt, answer, raw, thought, reference): `full` keeps them, `hashed` keeps the
first 16 hex digits of their SHA-256 (equal texts can be recognised, and a short text such as "positive" can be guessed
from its hash), `none` leaves them out. Numbers, verdicts, and the file and line of a prompt are always kept. Tags are
treated like the texts: they come from the data's own columns.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from safecl.config import ConfigError
from safecl.evaluation.statistics.intervals import Rate, rate
from safecl.storage.records import read_lines
from safecl.storage.run_records import MarkedAnswer

if TYPE_CHECKING:
    from safecl.evaluation.answers.prompts import Answer

Privacy = Literal["full", "hashed", "none"]
LONGEST_NAME: Final = 160
"""Bytes of a moment or a task in the name of a file; a file system takes 255 for the whole name."""

HASHED: Final = "sha256:"
"""Begins what is kept of a text as its hash."""
TEXTS = ("prompt", "answer", "reference", "raw", "thought", "prefill")


def given(answer: Answer) -> dict[str, Any]:
    """Return the part of a record that says what the model wrote. A thought is in `raw`."""
    optional = {name: value for name, value in answer.items() if name in ("prefill", "raw", "cut_off")}
    return {
        "answer": answer["text"],
        **optional,
        "num_tokens": answer["num_tokens"],
        "finished": answer["finished"],
    }


def plain_records(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records of safety that are of no variant."""
    return [record for record in records if record["set"] in ("disallowed", "benign")]


def is_disallowed(record: Mapping[str, Any]) -> bool:
    """Return whether a record answers a disallowed prompt, in any variant."""
    kind: str = record["set"].rpartition("/")[2]
    return kind == "disallowed"


def whole_answer(record: Mapping[str, Any]) -> str:
    """Return a record's answer with the prefill before it, as a reader sees it."""
    prefill, answer = record.get("prefill", ""), record["answer"]
    between = "" if not prefill or prefill[-1:].isspace() or answer[:1].isspace() else " "
    return f"{prefill}{between}{answer}"


def cut_off_rate(records: Sequence[Mapping[str, Any]]) -> Rate | None:
    """Compute the share of records whose thought does not end; None where there is none."""
    cut_off = [bool(record.get("cut_off")) for record in records]
    return rate(cut_off) if any(cut_off) else None


def write_outputs(path: str | Path, records: Iterable[Mapping[str, Any]], privacy: Privacy = "full") -> Path:
    """Write records as JSONL, completely or not at all (a temporary file is renamed). Creates the folder. Returns the
    path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(private(record, privacy), ensure_ascii=False) + "\n")
    os.replace(partial, path)
    return path


def private(record: Mapping[str, Any], privacy: Privacy) -> dict[str, Any]:
    """Return the record with only those texts that `privacy` allows."""
    if privacy == "full":
        return dict(record)
    if privacy not in ("hashed", "none"):
        raise ValueError(f"privacy {privacy!r} is not one of full, hashed, none")
    shown: dict[str, Any] = {}
    for key, value in record.items():
        if key in TEXTS or key == "tags":
            if privacy == "hashed":
                shown[key] = {tag: hash_of(text) for tag, text in value.items()} if key == "tags" else hash_of(value)
        else:
            shown[key] = value
    return shown


def rename_outputs(folder: str | Path, step: int, when: str, new: str) -> None:
    """Give the files of a moment the name of another one. Rank 0 calls it."""
    stem = f"{step:06d}-{file_name(when)}-"
    for path in Path(folder).glob(f"{glob.escape(stem)}*.jsonl"):
        os.replace(path, path.with_name(f"{step:06d}-{file_name(new)}-{path.name.removeprefix(stem)}"))


def file_name(text: str) -> str:
    """Return the text as a part of a file's name; of a long one the beginning and a hash of the whole."""
    name = re.sub(r"[^\w.-]+", "-", text).strip("-.") or "unnamed"
    if len(name.encode()) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{name.encode()[: LONGEST_NAME - 17].decode(errors='ignore')}-{digest}"


def hash_of(text: str) -> str:
    """Return `sha256:` and the first 16 hex digits of a text's SHA-256."""
    return HASHED + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def outputs_file(folder: str | Path, when: str, step: int) -> Path:
    """Return the file of a moment's safety records in an outputs folder."""
    return Path(folder) / f"{step:06d}-{file_name(when)}-safety.jsonl"


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Read the records of outputs/*-safety.jsonl. Raises ConfigError where the file cannot be read."""
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"{path}: cannot be read: there is no such file")
    return [dict(record) for record in read_lines(path, MarkedAnswer)]


def category_of(record: Mapping[str, Any], column: str) -> str | None:
    """Return the risk category of a record's prompt; None where it has none."""
    found = (record.get("tags") or {}).get(column)
    return str(found) if found else None
