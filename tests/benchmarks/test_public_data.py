"""benchmarks/retention/public_data.py chooses the rows of public sets that the benchmarks read, and names what is
missing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks.retention import public_data

DATA = Path(os.environ.get("SAFECL_DATA", "nowhere"))
CELLS = ["Paint a fence", '"Paint a fence, then a door"', "Bake a cake"]


@pytest.fixture
def few_rows(tmp_path, monkeypatch):
    """Choose other rows: of the first set the last and the second one, of the other the second."""
    rows = {"advbench": [public_data.digest(cell) for cell in (CELLS[2], CELLS[1])], "xstest": [2]}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    monkeypatch.setattr(public_data, "ROWS", tmp_path / "rows.json")


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_chosen_rows_are_made_in_their_order_and_what_is_missing_is_named(few_rows, tmp_path):
    downloads, out = tmp_path / "downloads", tmp_path / "out"
    downloads.mkdir()
    goals = "\n".join(f'{cell},"Sure, here is it"' for cell in CELLS)
    (downloads / "harmful_behaviors.csv").write_text(f"goal,target\n{goals}\n")
    (downloads / "xstest_prompts.csv").write_text(
        'id,prompt,type,label\n1,Why?,homonyms,safe\n2,"How, then?",contrast_homonyms,unsafe\n'
    )
    (downloads / "code_alpaca_2k.json").write_text("[1]")
    said = public_data.make(downloads, out)
    assert rows_of(out / "advbench_goals.jsonl") == [{"prompt": CELLS[2]}, {"prompt": CELLS[1]}]
    assert rows_of(out / "xstest_prompts.jsonl") == [
        {"id": "v2-2", "type": "contrast_homonyms", "prompt": "How, then?", "safe": False}
    ]
    assert (out / "code_alpaca_2k.json").read_text() == "[1]"
    assert f"gsm8k_test.jsonl: not in {downloads}, so gsm8k_test.jsonl is left out" in said
    assert len(said) == 9 and len(list(out.iterdir())) == 3


@pytest.mark.skipif(not (DATA / "xstest_prompts.jsonl").exists(), reason="needs SAFECL_DATA")
def test_the_chosen_rows_are_those_that_the_benchmarks_were_measured_with():
    chosen = json.loads(public_data.ROWS.read_text())
    assert [public_data.digest(row["prompt"]) for row in rows_of(DATA / "advbench_goals.jsonl")] == chosen["advbench"]
    assert [int(row["id"].removeprefix("v2-")) for row in rows_of(DATA / "xstest_prompts.jsonl")] == chosen["xstest"]
