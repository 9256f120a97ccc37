"""benchmarks/scan.py without a model: figures of another model do not take the place of the committed ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture
def scan(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import scan

    monkeypatch.setattr(scan, "measure", lambda *arguments: {"views": {}})
    monkeypatch.setattr(scan, "show", lambda found: None)
    monkeypatch.setattr(scan.harness, "renew_page", lambda page, parts: None)
    return scan


def test_another_model_needs_a_file_of_its_own(scan, monkeypatch, tmp_path, capsys):
    words = ["scan.py", "--folder", str(tmp_path), "--model", str(tmp_path)]
    monkeypatch.setattr(scan, "RESULTS", tmp_path / "committed.json")
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        scan.main()
    assert ended.value.code == 2 and "--out" in capsys.readouterr().err
    assert not scan.RESULTS.exists()
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path / "other.json")])
    scan.main()
    assert (tmp_path / "other.json").exists() and not scan.RESULTS.exists()
