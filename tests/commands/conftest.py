"""A verb in this process, in an environment of its own, and configs for it to read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from safecl import cli
from safecl.demo.materials import write_materials
from safecl.distributed import environment


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """What a verb sets in os.environ goes away again; the tests run as one process without a launcher."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in environment.VARIABLES:
        os.environ.pop(name, None)


@pytest.fixture
def run(capsys):
    """`run("check", path)`: (exit code, standard output, standard error) of the verb in this process."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        out = capsys.readouterr()
        return int(ended.value.code or 0), out.out, out.err

    return call


@pytest.fixture(scope="session")
def materials(tmp_path_factory):
    return write_materials(tmp_path_factory.mktemp("demo") / "demo")


@pytest.fixture
def task_config(materials, tmp_path):
    """A config of three steps on the demonstration's data and its random model, measured on few prompts."""

    def write(**sections: dict) -> Path:
        tree = yaml.safe_load(materials.arm_configs["plain"].read_text())
        tree["model"]["path"] = str(materials.random_model)
        tree["train"] |= {"max_steps": 3, "allow_few_steps": True}
        tree["safety"] |= {"max_prompts": 12, "max_new_tokens": 4}
        tree["tasks"][0]["eval"]["max_rows"] = 12
        tree["output"] = str(tmp_path / "out")
        for name, section in sections.items():
            tree[name] = (tree.get(name) or {}) | section if isinstance(section, dict) else section
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write
