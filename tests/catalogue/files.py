"""Files that cannot be read."""

from __future__ import annotations

import gzip
import lzma

# name: (content, what the message must say)
FILES = {
    "broken.json": (b'[{"text": "a"},\n {"text": }]', r"broken\.json:2: not valid JSON"),
    "number.json": (b"3", "must hold a list of rows"),
    "latin.json": ('[{"text": "é"}]'.encode("latin-1"), "not valid UTF-8"),
    "deep.json": (b"[" * 100_000, "not "),
    "utf16.jsonl": ('{"text": "a"}'.encode("utf-16"), "UTF-16"),
    "torn.jsonl.gz": (gzip.compress(b'{"text": "a"}' * 99)[:30], "not a whole gzip file"),
    "torn.jsonl.xz": (lzma.compress(b'{"text": "a"}' * 99)[:60], "not a whole xz file"),
    "torn.jsonl": (b"\x28\xb5\x2f\xfd nothing", "not a whole zstd file"),
    "rows.jsonl.zip": (b"PK\x03\x04", "ZIP archive; unpack it"),
    "rows.parquet.gz": (gzip.compress(b"PAR1"), "Parquet is compressed inside"),
    "broken.parquet": (b"PAR1 nothing PAR1", "not a readable Parquet file"),
    "no_header.csv": (b"\na,b\n", "must name the columns"),
    "twice.csv": (b"a,a\n1,2\n", "column `a` twice"),
    "rows.xlsx": (b"x", r"unknown kind of file `\.xlsx`; known: \.jsonl"),
    "rows": (b"x", "unknown kind of file"),
}
