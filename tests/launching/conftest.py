"""A config whose files exist, an environment without a launcher, and a stand-in for a launcher with its ranks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from safecl import cli
from safecl.distributed import environment


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in [*environment.VARIABLES, *(name for name in os.environ if name.startswith(("NCCL_", "SAFECL_RANK")))]:
        os.environ.pop(name, None)


@pytest.fixture
def config(tmp_path) -> Path:
    """A config file with a section `launch`, whose model and data are there and empty."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    tree = {
        "model": {"path": str(tmp_path / "model")},
        "tasks": [{"name": "a", "train": str(tmp_path / "rows.jsonl")}],
        "launch": {"gpus_per_node": 2},
        "output": str(tmp_path / "run-A_1"),
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def safecl(capsys):
    """`safecl("launch", path, ...)`: (exit code, standard output, standard error)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        out = capsys.readouterr()
        return int(ended.value.code or 0), out.out, out.err

    return call
