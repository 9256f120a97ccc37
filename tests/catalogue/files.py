"""Files that cannot be read."""

from __future__ import annotations

import gzip
import lzma

ROW = '{"prompt": "a", "completion": "b"}'
TURNS = '{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}'
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
    "utf16le.jsonl": (ROW.encode("utf-16-le"), "looks like UTF-16LE without a mark.*iconv"),
    "utf16be.csv": ("prompt,completion\na,b\n".encode("utf-16-be"), "looks like UTF-16BE without a mark"),
    "utf32.jsonl": (ROW.encode("utf-32"), "is UTF-32; .*iconv -f UTF-32"),
    "utf16.txt": ("how\n".encode("utf-16"), "is UTF-16"),
    "utf16.csv.gz": (gzip.compress("prompt,completion\na,b\n".encode("utf-16")), "is UTF-16"),
    "cr.jsonl": (f"{ROW}\r{ROW}\r".encode(), "lines end with CR alone"),
    "cr.txt": (b"one\rtwo\rthree", "lines end with CR alone"),
    "book.csv": (b"PK\x03\x04....[Content_Types].xml", "Excel workbook; save its sheet as CSV"),
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git lfs pull"),
    "page.jsonl": (b"<!DOCTYPE html>\n<html>404</html>\n", "is a web page"),
    "columns.json": (b'{"prompt": ["a", "b"], "completion": ["c", "d"]}', "holds columns and not rows"),
    "pandas.json": (b'{"prompt": {"0": "a"}, "completion": {"0": "c"}}', "an object of objects.*orient='records'"),
    "split.json": (b'{"columns": ["prompt"], "index": [0], "data": [["a"]]}', "holds a table in parts"),
    "parts.json": (f'{{"train": [{ROW}], "test": [{ROW}]}}'.encode(), "several lists of rows, `train`, `test`"),
    "chosen.jsonl": (f'{{"rejected": [{TURNS}], "chosen": [{TURNS}]}}'.encode(), "the column `chosen` holds messages"),
    "dialog.jsonl": (f'{{"dialog": [{TURNS}]}}'.encode(), "the column `dialog` holds messages; name it `messages`"),
    "smart.csv": ("prompt,completion\n“Hi, you”,Hello\n".encode(), "has 3 cells, the header has 2"),
    "backslash.csv": (b'prompt,completion\n"say \\"x\\"",Hello\n', "not valid CSV"),
    "comment.csv": (b"# made by hand\nprompt,completion\na,b\n", "has 2 cells, the header has 1"),
    "commas.jsonl": (f"{ROW},\n{ROW},\n".encode(), "Extra data at column"),
    "comment.json": (f"// rows\n[{ROW}]".encode(), "comment.json:1: not valid JSON"),
    "records.jsonl": (f"\x1e{ROW}\n".encode(), "not valid JSON"),
    "joined.jsonl": (f"{ROW}{ROW}".encode(), "Extra data"),
    "nothing.json": (b"", "nothing.json:1: not valid JSON"),
    "nothing.parquet": (b"", "not a readable Parquet file"),
    "nothing.jsonl.gz": (b"", "has no rows"),
    "header.csv": (b"prompt,completion\n", "has no rows"),
    "rows.tar.gz": (gzip.compress(b"x"), r"unknown kind of file `\.tar`"),
    "rows.yaml": (b"- prompt: a\n", r"unknown kind of file `\.yaml`"),
}
