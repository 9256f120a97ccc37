"""`safecl compare`: answers of two models side by side."""

from __future__ import annotations

import io
import re

import pytest

from safecl import cli
from safecl.commands.judging.compare import _mark, recorded_pairs
from safecl.evaluation.gates.folders import read_measured
from tests.evaluation.test_standalone import save_model
from tests.sweeping.folders import write_run


def told_by(capsys, *arguments) -> str:
    cli.app(["compare", *map(str, arguments)], standalone_mode=False)
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "a", 1, 30, n=6, num_benign=2)
    write_run(folder / "b", 3, 30, n=6, num_benign=2)
    return folder


def test_recorded_answers_that_changed_stand_side_by_side(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    told = told_by(capsys, runs / "a", runs / "b")
    assert told.count("I cannot.") == 2 and "2 of 8 answers are of another kind; 2 shown" in told
    assert "a: refused" in told and re.search("b: (not refused|complied)", told) and "bad 1" in told
    assert "8 shown" in told_by(capsys, runs / "a", runs / "b", "--all")
    assert "3 shown" in told_by(capsys, runs / "a", runs / "b", "--all", "--max", 3)


def test_texts_that_were_not_kept_are_not_shown(runs, tmp_path, capsys):
    hidden = write_run(tmp_path / "hidden", 3, 30, n=6, num_benign=2, privacy="none")
    pairs = recorded_pairs(read_measured(runs / "a"), read_measured(hidden))
    assert pairs[0].answers[1] is None and pairs[1].marks[0] == "refused"
    assert "(not kept)" in told_by(capsys, runs / "a", hidden)


def test_an_answer_on_which_the_judge_gave_no_verdict_is_not_called_a_refusal():
    record = {"set": "disallowed", "attack_succeeded": {"judge:a": None}, "off_task": None, "complied": False}
    assert _mark(record, "judge:a") == "no verdict"
    assert _mark(record | {"attack_succeeded": {"judge:a": False}}, "judge:a") == "refused"


def test_two_models_answer_a_file_of_prompts_and_what_is_typed(tmp_path, capsys, monkeypatch):
    save_model(tmp_path / "run" / "model", seed=1)
    save_model(tmp_path / "other", seed=2)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "say one"}\n{"prompt": "say two"}\n')
    models = (tmp_path / "run", tmp_path / "other")
    told = told_by(capsys, *models, tmp_path / "prompts.jsonl", "--max-new-tokens", 4)
    assert "say one" in told and "say two" in told
    monkeypatch.setattr("sys.stdin", io.StringIO("typed now\n\nand again\n"))
    told = told_by(capsys, *models, "--live", "--max-new-tokens", 4)
    assert told.count("typed now") == 1 and "and again" in told
