"""benchmarks/safety/scan.py without a model: figures of another model do not take the place of the committed ones."""

from __future__ import annotations

import sys

import pytest

from benchmarks.safety import scan


@pytest.fixture(autouse=True)
def nothing_is_measured(monkeypatch):
    monkeypatch.setattr(scan, "measure", lambda *arguments: {"views": {}})
    monkeypatch.setattr(scan, "show", lambda found: None)
    monkeypatch.setattr(scan.harness, "renew_page", lambda page, parts: None)


def test_another_model_needs_a_file_of_its_own(monkeypatch, tmp_path, capsys):
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
