"""Files made to hurt are refused in few seconds with exit code 2 and one message: nothing in them runs, nothing outside
of the named folders is read, and what a user sees holds no escape sequences."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.commands.conftest import materials, own_environment, run  # noqa: F401
from tests.hostile.corpus import CASES, EXECUTED, SECRET, Place

SECONDS = 10
UNESCAPED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture
def place(materials, tmp_path, monkeypatch) -> Place:  # noqa: F811
    folder = tmp_path / "case"
    shutil.copytree(materials.random_model, folder / "model")
    (folder / "outside").mkdir()
    (folder / "outside" / "secret").write_text(SECRET)
    tree = yaml.safe_load(materials.arm_configs["plain"].read_text())
    tree["model"]["path"] = str(folder / "model")
    tree["train"] |= {"max_steps": 3, "allow_few_steps": True}
    tree["tasks"][0].pop("eval", None)
    tree.pop("safety", None)
    tree["output"] = str(folder / "out")
    monkeypatch.chdir(folder)
    return Place(folder, tree)


_opened: list[str] = []
sys.addaudithook(lambda event, values: _opened.append(str(values[0])) if event == "open" else None)


QUICK = (
    "index_with_a_path_upwards", "weights_that_are_a_link", "weights_that_are_a_pickle", "settings_that_are_a_pipe",
    "settings_that_are_deep", "settings_with_a_million_layers", "settings_with_code", "template_that_takes_all_memory",
    "template_that_reaches_for_python_1", "adapter_that_is_a_pickle", "rows_with_escapes_and_markup",
    "rows_in_a_dataset_folder_with_a_path_upwards", "config_with_a_python_tag", "config_with_an_entity_bomb",
    "path_of_no_user", "name_with_escapes",
)  # fmt: skip
"""One of each kind; the others take as long together as the rest of the tests of this folder."""


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in CASES]
)
def test_a_file_made_to_hurt_is_refused(run, place, name):  # noqa: F811
    case = CASES[name]
    case.make(place)
    config = place.folder / "run.yaml"
    config.write_bytes(place.raw if place.raw is not None else yaml.safe_dump(place.tree).encode())
    _opened.clear()
    began = time.monotonic()
    code, out, err = run("check", config)
    seconds = time.monotonic() - began
    said = out + err
    assert code in ((0, 2) if case.code is None else (case.code,)), said[-2000:]
    assert seconds < SECONDS, seconds
    assert not list(place.folder.rglob(EXECUTED)) and not Path(EXECUTED).exists()
    outside = [path for path in _opened if os.path.realpath(path).startswith(str(place.outside))]
    assert SECRET not in said and not outside, outside
    assert not UNESCAPED.search(said), UNESCAPED.findall(said)
    assert "Traceback" not in said and "weights_only" not in said and len(said) < 20_000
    if case.code:
        assert err.partition("loading torch\n")[2].startswith("safecl: error: ") or err.startswith("safecl: error: "), (
            err
        )
    for word in case.words:
        assert word in said, said
    assert json.dumps(said)
