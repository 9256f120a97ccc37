"""Malformed input: every case ends as a named and counted row, or as a message about the file; never as a traceback."""

from __future__ import annotations

import json

import pytest

from safecl.data import DataError, read_prompts, read_rows
from tests.catalogue.rows import COLUMNS, GOOD, GOOD_COLUMNS, LINES, SECRET


def check_report(report: str) -> None:
    for line in report.splitlines():
        assert SECRET[:85] not in line, "a message shows more than 80 characters of somebody's row"
        assert line.isprintable(), "a message must not carry control characters to the terminal"


@pytest.mark.parametrize("case", LINES)
def test_a_malformed_line_is_named_and_counted_and_its_neighbours_are_read(tmp_path, case):
    line, says = LINES[case]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([GOOD, line, GOOD, b""]))
    rows, bad = read_rows(str(path), max_bad_rows=1)
    assert [row.line for row in rows] == [1, 3]
    assert (bad.count, bad.seen) == (1, 3)
    assert bad.examples[0].startswith(f"{path}:2: ") and says in bad.examples[0]
    check_report(str(bad).replace(str(path), ""))


@pytest.mark.parametrize("case", COLUMNS)
def test_a_row_with_wrong_columns_is_named_and_counted(tmp_path, case):
    format, columns, says = COLUMNS[case]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (GOOD_COLUMNS[format], columns)))
    rows, bad = read_rows(str(path), format=format, max_bad_rows=1)
    assert len(rows) == 1 and bad.count == 1
    assert bad.examples[0].startswith(f"{path}:2: ") and says in bad.examples[0], bad.examples
    check_report(str(bad).replace(str(path), ""))


@pytest.mark.parametrize("case", LINES)
def test_prompts_meet_the_same_lines_without_a_traceback(tmp_path, case):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(LINES[case][0] + b'\n{"prompt": "Hi"}\n')
    prompts = read_prompts(str(path), max_bad_rows=1)
    assert "Hi" in [p.text for p in prompts]


# ------------------------------------------------------------------------------------------------------------ the limit


def file_with(tmp_path, num_good: int, num_bad: int) -> str:
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([GOOD] * num_good + [b"{"] * num_bad))
    return str(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("num_bad", "limit", "stops"),
    [
        (1, 0.01, False),
        (2, 0.01, True),
        (1, 0, True),
        (0, 0, False),
        (5, 5, False),
        (6, 5, True),
        (1, 1, False),
        (2, 1, True),
        (99, 0.99, False),
    ],
)
def test_the_limit_is_a_share_below_one_and_a_count_from_one_on(tmp_path, num_bad, limit, stops):
    path = file_with(tmp_path, 100 - num_bad, num_bad)
    if not stops:
        assert read_rows(path, max_bad_rows=limit)[1].count == num_bad
        return
    with pytest.raises(DataError, match=rf"{num_bad} of 100 rows .*max_bad_rows") as caught:
        read_rows(path, max_bad_rows=limit)
    assert f"rows.jsonl:{101 - num_bad}: not valid JSON" in str(caught.value)


def test_only_the_first_bad_rows_are_listed_and_the_rest_is_counted(tmp_path):
    bad = read_rows(file_with(tmp_path, 50, 40), max_bad_rows=0.9, limit_report=3)[1]
    assert bad.count == 40 and len(bad.examples) == 3 and "and 37 more" in str(bad)


def test_a_file_without_one_good_row_stops_whatever_the_limit(tmp_path):
    with pytest.raises(DataError, match="none of the 3 rows"):
        read_rows(file_with(tmp_path, 0, 3), max_bad_rows=1000)


@pytest.mark.parametrize("content", [b"", b"\n\n \n", b"\xef\xbb\xbf"])
def test_a_file_without_rows_is_a_message(tmp_path, content):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.jsonl: has no rows"):
        read_rows(str(tmp_path / "rows.jsonl"))


def test_random_bytes_never_give_a_traceback(tmp_path):
    import random

    source = random.Random(0)
    for name in ("a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.txt"):
        for _ in range(40):
            whole = bytearray(GOOD + b"\n" + GOOD)
            for _ in range(source.randrange(1, 60)):
                whole[source.randrange(len(whole))] = source.randrange(256)
            (tmp_path / name).write_bytes(whole if source.random() < 0.5 else source.randbytes(source.randrange(200)))
            for read in (lambda p: read_rows(p, max_bad_rows=0.9), read_prompts):
                try:
                    read(str(tmp_path / name))
                except DataError as error:
                    assert name in str(error)
