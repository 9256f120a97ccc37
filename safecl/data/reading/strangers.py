"""Names files that are something else than their suffix says, or in another encoding, with what makes them readable."""

from __future__ import annotations

from pathlib import Path

from safecl.data.messages import DataError
from safecl.data.reading.raw import open_bytes, packing_of, suffix_of

_BLOCK = 2**16
_TEXT = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
_UTF8 = "save it as UTF-8, e.g. `iconv -f {} -t UTF-8`"


def refuse_strangers(path: str, local: Path) -> None:
    """Raise DataError for a file whose beginning says that no row can be read from it. Raises OSError."""
    with local.open("rb") as file:
        start = file.read(_BLOCK)
    if problem := _of_archives(start):
        raise DataError(f"{path}: {problem}")
    if suffix_of(local) == ".parquet" and packing_of(local) is not None:
        raise DataError(f"{path}: is a compressed Parquet file; unpack it first, Parquet is compressed inside")
    if suffix_of(local) not in _TEXT:
        return
    with open_bytes(path, local) as unpacked:
        start = unpacked.read(_BLOCK)
    if problem := _of_encodings(start) or _of_texts(start) or _of_line_ends(start, suffix_of(local)):
        raise DataError(f"{path}: {problem}")


def _of_archives(start: bytes) -> str | None:
    if start[:2] != b"PK":
        return None
    if b"[Content_Types].xml" in start or b"xl/" in start:
        return "is an Excel workbook; save its sheet as CSV"
    return "is a ZIP archive; unpack it first, e.g. `unzip`"


def _of_encodings(start: bytes) -> str | None:
    for mark, name in ((b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16")):
        if start.startswith(mark):
            return f"is {name}; {_UTF8.format(name)}"
    if start.startswith(b"\xfe\xff"):
        return f"is UTF-16; {_UTF8.format('UTF-16')}"
    sample = start[:512]
    for zeros, name in ((sample[1::2], "UTF-16LE"), (sample[::2], "UTF-16BE")):
        if len(zeros) > 4 and zeros.count(0) > 0.8 * len(zeros) and sample.count(0) < 0.6 * len(sample):
            return f"looks like {name} without a mark; {_UTF8.format(name)}"
    return None


def _of_texts(start: bytes) -> str | None:
    begin = start.lstrip(b"\xef\xbb\xbf \t\r\n")[:64].lower()
    if begin.startswith(b"version https://git-lfs."):
        return "is a pointer of Git LFS and not the file itself; fetch it with `git lfs pull`"
    return "is a web page (HTML) and no data" if begin.startswith((b"<!doctype html", b"<html")) else None


def _of_line_ends(start: bytes, suffix: str) -> str | None:
    if suffix in (".csv", ".tsv", ".json") or b"\n" in start or b"\r" not in start.rstrip(b"\r"):
        return None  # the csv library reads them, and to JSON they are white space
    return "its lines end with CR alone, so it would be one line; convert it, e.g. `tr '\\r' '\\n'`"
