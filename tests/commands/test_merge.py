"""`safecl merge`: help, settings, the report, and wrong use."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from safecl.cli import app
from safecl.commands import merge, spinner
from safecl.distributed import progress
from safecl.merging import kinds
from safecl.training.output.heartbeat import how_far
from tests.commands.processes import ROOT
from tests.merging import models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return models.make_parents("llama", tmp_path_factory.mktemp("parents"))


def safecl(*arguments):
    return CliRunner().invoke(app, ["merge", *map(str, arguments)])


def test_the_help_lists_every_kind_with_a_line_about_it():
    shown = " ".join(safecl("--help").output.split())
    for kind, line in kinds().items():
        assert f"{kind}: " in shown and len(line) > 20 and "\n" not in line


@pytest.mark.parametrize("kind", sorted(kinds()))
def test_every_kind_shows_what_it_needs_and_each_setting_with_its_meaning(kind):
    from safecl.merging.registry import kind_module

    shown = safecl(kind, "--settings")
    assert shown.exit_code == 0 and "models: " in shown.output
    fields = kind_module(kind).Config.model_fields
    assert all(name in shown.output for name in fields)
    assert all(field.description for field in fields.values())


def test_a_log_hears_of_a_merge_at_work_and_how_far_it_is(folders, tmp_path, monkeypatch):
    said, working = [], spinner.working
    monkeypatch.setattr(merge, "working", lambda what: (said.append(what), working(what))[1])
    add = progress.Part.__setattr__

    def count(part, name, value):
        add(part, name, value)
        said.append(how_far())

    monkeypatch.setattr(progress.Part, "__setattr__", count)
    assert (
        safecl("wise_ft", "--base", folders["base"], "--tuned", folders["tuned"], "-o", tmp_path / "out").exit_code == 0
    )
    assert said[0] == "merging: wise_ft"
    assert re.fullmatch(r": ([\d,]+) of \1 values, about 0 s left", said[-1]), "each value is counted, and once"
    assert how_far() == ""


def test_a_merge_prints_its_report_and_writes_the_folder(folders, tmp_path):
    out = tmp_path / "out"
    done = safecl("wise_ft", "--base", folders["base"], "--tuned", folders["tuned"], "alpha=0.25", "-o", out)
    assert done.exit_code == 0, done.output
    assert f"wise_ft of base {folders['base']}, tuned {folders['tuned']}" in done.output
    assert (out / "config.json").is_file()
    tuned = ["--tuned", folders["tuned"], "--tuned", folders["tuned2"]]
    pattern = '{"*.mlp.*": 0, "*": [0, 1]}'
    done = safecl("linear", *tuned, f"weights=[1, {pattern}]", "-o", tmp_path / "second", "--json")
    report = json.loads(done.stdout)
    assert report["settings"]["weights"] == [1, {"*.mlp.*": 0, "*": [0, 1]}]
    assert [parent["role"] for parent in report["parents"]] == ["tuned", "tuned 2"]


WRONG = {
    "no merge is called `wise-ft`; did you mean `wise_ft`?": ["wise-ft"],
    "wise_ft: unknown key `aplha`; did you mean `alpha`?": ["wise_ft", "aplha=1"],
    "'0.5' is not an override; write key.path=value": ["wise_ft", "0.5"],
    "wise_ft: no folder to write: -o OUT": ["wise_ft", "alpha=1"],
    "ties.density: must be less than or equal to 1 (got 3)": ["ties", "density=3"],
    "post_hoc_ema: profile: ema needs decay": ["post_hoc_ema", "profile=ema"],
    "fisher_average.fisher: missing, and there is no default": ["fisher_average"],
}


def test_wrong_use_ends_with_code_2_and_one_message_before_torch_is_imported():
    code = """if True:
        import sys
        from safecl.cli import main
        for arguments in sys.argv[1:]:
            try:
                main(["merge", *arguments.split("|")])
            except SystemExit as end:
                print(end.code, file=sys.stderr)
        heavy = {"torch", "transformers", "deepspeed", "datasets"} & set(sys.modules)
        assert not heavy, heavy
    """
    command = [sys.executable, "-c", code, *("|".join(arguments) for arguments in WRONG.values())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
    lines = done.stderr.splitlines()
    assert done.returncode == 0, done.stderr
    for number, message in enumerate(WRONG):
        assert message in lines[2 * number] and lines[2 * number + 1] == "2", lines


def test_a_folder_that_cannot_be_merged_ends_with_code_2(folders, tmp_path):
    (empty := tmp_path / "empty").mkdir()
    done = safecl("wise_ft", "--base", folders["base"], "--tuned", empty, "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert f"{empty}/config.json: No such file or directory" in done.output
