"""The examples of docs/data.md are what safecl reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from safecl.data import prepare_dataset, read_rows
from safecl.data.reading.formats import detect
from tests.data import tokenizers as tk

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^\*\*(\w+)\*\*.*?```json\n(.*?)\n```", PAGE, re.M | re.S))


@pytest.mark.parametrize("format", ["messages", "prompt_completion", "alpaca", "sharegpt", "text"])
def test_each_formats_example_is_detected_as_that_format(tmp_path, format):
    (tmp_path / "rows.jsonl").write_text(EXAMPLES[format])
    rows, _ = read_rows(str(tmp_path / "rows.jsonl"))
    assert rows[0].messages[-1].is_trained and detect(yaml.safe_load(EXAMPLES[format])) == format


def test_the_example_with_templates_is_read_with_the_templates_beside_it(tmp_path):
    (tmp_path / "rows.jsonl").write_text(EXAMPLES["fields"])
    task = yaml.safe_load(re.search(r"```yaml\n(.*?)\n```", PAGE, re.S)[1])["tasks"][0]
    rows, _ = read_rows(str(tmp_path / "rows.jsonl"), fields=task["fields"])
    assert [m.content for m in rows[0].messages] == [
        "Review: a sharp , amusing study of the cult of celebrity\nSentiment:",
        "positive",
    ]


def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text(EXAMPLES["messages"])
    tk.byte_level().save_pretrained("my-model")
    exec(re.search(r"```python\n(.*?)\n```", PAGE, re.S)[1], {})
    assert len(prepare_dataset("train.jsonl", tokenizer=tk.byte_level(), max_length=2048, cache_dir="cache")) == 1
