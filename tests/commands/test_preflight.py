"""What is refused before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from safecl.exits import ExitCode
from tests.commands.processes import ROOT


def test_every_missing_file_is_told_at_once_before_torch_is_imported(task_config):
    missing = {
        "tasks": [{"name": "t", "train": "no/rows.jsonl"}],
        "model": {"path": "./none"},
        "memory": {"source": "gone.csv"},
    }
    for verb in ("check", "train"):
        code = f"import sys; sys.argv[1:] = ['{verb}', '{task_config(**missing)}']; import atexit, safecl.cli\n"
        code += "atexit.register(lambda: print('torch' in sys.modules)); safecl.cli.main()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, done.stdout) == (ExitCode.USAGE, "False\n")
        for expected in (
            "model.path: there is no folder ./none",
            "tasks.0.train: no/rows.jsonl: no such file",
            "memory.source: gone.csv: no such",
        ):
            assert expected in done.stderr


def test_an_output_that_cannot_be_a_folder_is_refused_before_anything_is_read(run, task_config, tmp_path):
    (tmp_path / "file").write_text("")
    for verb in ("check", "train"):
        code, _, err = run(verb, task_config(output=str(tmp_path / "file" / "run"), model={"path": "none"}))
        assert code == ExitCode.USAGE and "is a file" in err


def test_without_a_network_a_hub_id_is_told_at_once(run, tmp_path, monkeypatch):
    from safecl.commands.preflight import settle_hub

    def no_network(*_):
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", no_network)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    settle_hub([str(tmp_path)])
    assert "HF_HUB_OFFLINE" not in os.environ
    settle_hub([str(tmp_path), "owner/model"])
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("verb", ["demo", "proof"])
def test_a_folder_that_cannot_be_made_is_told_before_any_work(run, verb):
    code, _, err = run(verb, "/proc/nothing")
    assert code == ExitCode.USAGE and "/proc/nothing cannot be made" in err


def test_a_folder_that_is_no_model_is_told_by_its_key(run, tmp_path, task_config):
    (tmp_path / "elsewhere").mkdir()
    code, _, err = run("check", task_config(), f"model.path={tmp_path / 'elsewhere'}")
    assert code == ExitCode.USAGE and "is not a model folder" in err and "model.path" in err
