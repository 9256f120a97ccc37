"""Files of every kind give the same rows with the number of their line; a file that cannot be read is a message."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import subprocess
import sys

import pytest

from safecl.data import DataError, read_prompts, read_rows
from safecl.data.reading.files import open_source, where
from tests.catalogue.files import FILES

ROWS = [{"prompt": f'say "{i}",\nplease', "completion": f"é {i}"} for i in range(4)]


def write_csv(path, delimiter=",", encoding="utf-8"):
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


def packed(path, name, compress):
    WRITERS[name](path)
    path.write_bytes(compress(path.read_bytes()))


def zstd(data: bytes) -> bytes:
    import pyarrow

    return pyarrow.compress(data, codec="zstd", asbytes=True)


WRITERS = {
    "rows.jsonl": lambda p: p.write_text("\n".join(json.dumps(r) for r in ROWS)),
    "rows.ndjson": lambda p: p.write_text(
        "\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS) + "\n", encoding="utf-8"
    ),
    "windows.jsonl": lambda p: p.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(r).encode() for r in ROWS)),
    "array.json": lambda p: p.write_text(json.dumps(ROWS, indent=2)),
    "bom.json": lambda p: p.write_text(json.dumps(ROWS), encoding="utf-8-sig"),
    "wrapped.json": lambda p: p.write_text(json.dumps({"version": "1", "data": ROWS})),
    "lines_called.json": lambda p: p.write_text("\n".join(json.dumps(r) for r in ROWS)),
    "array_called.jsonl": lambda p: p.write_text(json.dumps(ROWS, indent=1)),
    "rows.csv": write_csv,
    "bom.csv": lambda p: write_csv(p, encoding="utf-8-sig"),
    "rows.tsv": lambda p: write_csv(p, "\t"),
    "ROWS.CSV": write_csv,
    "rows.parquet": write_parquet,
    "semicolon.csv": lambda p: write_csv(p, ";"),
    "tab.csv": lambda p: write_csv(p, "\t", "utf-8-sig"),
    "comma.tsv": write_csv,
    "bar.csv": lambda p: write_csv(p, "|"),
    "indented.jsonl": lambda p: p.write_text("\n".join(json.dumps(r, indent=2) for r in ROWS) + "\n"),
    "indented.json": lambda p: p.write_text("".join(json.dumps(r, indent=2) for r in ROWS)),
    "broken_lines.jsonl": lambda p: p.write_text("\n".join(json.dumps(r).replace('", "', '",\n "') for r in ROWS)),
    "broken_lines.json": lambda p: p.write_text("\r\n".join(json.dumps(r).replace(": ", ":\r\n") for r in ROWS)),
    "wrapped.jsonl": lambda p: p.write_text(json.dumps({"data": ROWS}, indent=2)),
    "packed.jsonl.gz": lambda p: packed(p, "rows.jsonl", gzip.compress),
    "packed.json.bz2": lambda p: packed(p, "array.json", bz2.compress),
    "packed.csv.xz": lambda p: packed(p, "rows.csv", lzma.compress),
    "packed.jsonl.zst": lambda p: packed(p, "rows.ndjson", zstd),
    "packed.csv.zst": lambda p: packed(p, "semicolon.csv", zstd),
    "packed.jsonl": lambda p: packed(p, "array_called.jsonl", gzip.compress),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    WRITERS[name](tmp_path / name)
    rows, bad = read_rows(str(tmp_path / name))
    assert [(r.messages[0].content, r.messages[1].content) for r in rows] == [
        (r["prompt"], r["completion"]) for r in ROWS
    ]
    is_table = name.lower().endswith(("csv", "tsv", "csv.xz", "csv.zst"))  # a header, and a line break inside each row
    assert [r.line for r in rows] == ([2, 4, 6, 8] if is_table else [1, 2, 3, 4]) and bad.count == 0


def test_an_object_that_goes_on_in_the_next_line_of_a_file_of_lines_is_named_with_the_fix(tmp_path):
    one, other = (json.dumps(row) for row in ROWS[:2])
    (tmp_path / "rows.jsonl").write_text("\n".join([one, *other.replace('", "', '",\n "').split("\n"), one]))
    rows, bad = read_rows(str(tmp_path / "rows.jsonl"), max_bad_rows=2)
    assert len(rows) == 2 and bad.count == 2
    assert "rows.jsonl:2: " in bad.examples[0] and "write one per line, e.g. `jq -c .`" in bad.examples[0]


ON_LINES = ("rows.jsonl", "lines_called.json", "rows.csv", "rows.tsv")


@pytest.mark.parametrize("name", [*ON_LINES, "array.json", "wrapped.json", "array_called.jsonl", "rows.parquet"])
def test_a_row_that_is_no_line_is_not_told_as_one(tmp_path, name):
    WRITERS[name](tmp_path / name)
    path = str(tmp_path / name)
    assert where(path, 3) == (f"{path}:3" if name in ON_LINES else f"{path}, row 3") == open_source(path).where(3)


def test_excels_line_that_names_the_delimiter_is_no_header(tmp_path):
    (tmp_path / "a.csv").write_text("\ufeffsep=;\nprompt;completion\na, b;c\nd\n", encoding="utf-8")
    rows, bad = read_rows(str(tmp_path / "a.csv"), max_bad_rows=1)
    assert [(r.line, r.messages[0].content) for r in rows] == [(3, "a, b")] and "a.csv:4: has 1 cells" in bad.examples[
        0
    ]


def test_nan_in_a_csv_file_is_an_empty_cell(tmp_path):
    (tmp_path / "a.csv").write_text("instruction,input,output\na,nan,b\na,,NaN\n")
    rows, bad = read_rows(str(tmp_path / "a.csv"), max_bad_rows=1)
    assert rows[0].messages[0].content == "a" and "a.csv:3: `output` is null" in bad.examples[0]


def test_lines_are_counted_as_an_editor_counts_them(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"text": "a"}\n\n\n{"text": ""}\n{"text": "b"}\n')
    rows, bad = read_rows(str(tmp_path / "a.jsonl"), max_bad_rows=1)
    assert [r.line for r in rows] == [2, 6] and "a.jsonl:5: " in bad.examples[0]


def test_one_object_in_a_json_file_is_one_row(tmp_path):
    (tmp_path / "a.json").write_text(
        json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    )
    assert len(read_rows(str(tmp_path / "a.json"))[0]) == 1
    (tmp_path / "a.json").write_text('{"text": "b"}')
    assert len(read_rows(str(tmp_path / "a.json"))[0]) == 1


def test_text_files_are_prompts_line_by_line(tmp_path):
    (tmp_path / "a.txt").write_text("first\n\nsecond\n")
    assert [(p.text, p.line) for p in read_prompts(str(tmp_path / "a.txt"))] == [("first", 1), ("second", 3)]


def test_bad_csv_rows_are_named_by_the_line_where_they_begin(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'prompt,completion\np,"c\n\nd"\r\n\nonly one\np,c,too many\n\xff,c\np,\np,c\n')
    rows, bad = read_rows(str(tmp_path / "a.csv"), max_bad_rows=4)
    assert [r.line for r in rows] == [2, 10]
    said = "\n".join(bad.examples)
    for part in (
        "a.csv:6: has 1 cells, the header has 2",
        "a.csv:7: has 3 cells",
        "a.csv:8: message 1 (user) is not valid Unicode",
        "a.csv:9: message 2",
    ):
        assert part in said


def test_a_quote_that_is_never_closed_stops_the_run(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,completion\np,c\np,"c\np,c\np,c\n')
    with pytest.raises(DataError, match=r"a\.csv:3: a quote is opened that is never closed"):
        read_rows(str(tmp_path / "a.csv"), max_bad_rows=0.99)


def test_a_key_that_appears_twice_spoils_one_row_of_a_json_file_and_not_the_file(tmp_path):
    (tmp_path / "a.json").write_text(
        '{"data": [{"text": "a"}, {"text": "b", "text": "c"}, {"text": "d", "more": [{"x": 1, "x": 2}]}]}'
    )
    rows, bad = read_rows(str(tmp_path / "a.json"), max_bad_rows=2)
    assert [r.line for r in rows] == [1] and "row 2: not usable JSON: the key `text` appears twice" in bad.examples[0]
    assert "row 3" in bad.examples[1] and "`x`" in bad.examples[1]


def test_lists_line_by_line_are_bad_rows_and_not_a_broken_array(tmp_path):
    (tmp_path / "a.jsonl").write_text('[{"role": "user"}]\n[{"role": "user"}]\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: a row must be a JSON object"):
        read_rows(str(tmp_path / "a.jsonl"))


def test_a_broken_row_of_a_parquet_file_is_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    broken = pyarrow.array([b"good", b"\xff\xfe"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "a.parquet")
    rows, bad = read_rows(str(tmp_path / "a.parquet"), max_bad_rows=1)
    assert len(rows) == 1 and "row 2: a value is not valid UTF-8" in bad.examples[0]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_a_message_that_names_it(tmp_path, name):
    content, says = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        read_rows(str(tmp_path / name))
    assert name in str(caught.value)


def test_a_missing_file_names_the_nearest_one(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"no such file; did you mean .*train\.jsonl\?"):
        read_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match=r"no such file; there is no folder"):
        read_rows(str(tmp_path / "nowhere" / "train.jsonl"))


def test_a_folder_of_files_says_to_name_one(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"is a folder.*train\.jsonl"):
        read_rows(str(tmp_path))


def test_a_saved_data_set_folder_is_read_split_by_split(tmp_path):
    import datasets

    saved = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    )
    saved.save_to_disk(tmp_path / "all")
    saved["test"].save_to_disk(tmp_path / "one")
    assert [r.messages[1].content for r in read_rows(str(tmp_path / "all"))[0]] == [r["completion"] for r in ROWS]
    assert len(read_rows(str(tmp_path / "all"), split="test")[0]) == len(read_rows(str(tmp_path / "one"))[0]) == 1
    with pytest.raises(DataError, match="has no split `dev`; it has train, test"):
        read_rows(str(tmp_path / "all"), split="dev")


def test_a_hub_id_is_loaded_with_its_configuration_and_split(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows, _ = read_rows("openai/gsm8k:main", split="test")
    assert asked == [("openai/gsm8k", "main", "test")] and len(rows) == 4 and rows[0].path == "openai/gsm8k:main"
    assert open_source("squad").unit == "row" and asked[-1] == ("squad", None, "train")


def test_a_hub_that_cannot_be_reached_is_a_message(monkeypatch):
    import datasets

    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub (offline)\nwith many\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        DataError, match=r"^nobody/nothing: no such file, and not a data set that the hub gives: Couldn't reach[^\n]*$"
    ):
        read_rows("nobody/nothing")


def test_the_fingerprint_follows_the_content(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}')
    first = open_source(path).fingerprint()
    assert open_source(path).fingerprint() == first
    path.write_text('{"text": "b"}')
    assert open_source(path).fingerprint() != first


def test_reading_rows_imports_neither_torch_nor_transformers(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    code = (
        "import sys; from safecl.data import DataError, read_prompts, read_rows; "
        f"read_rows({str(tmp_path / 'a.jsonl')!r}); read_prompts({str(tmp_path / 'a.jsonl')!r}); "
        "print([name for name in ('torch', 'transformers', 'datasets', 'pyarrow', 'pandas') if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
