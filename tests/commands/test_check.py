"""`safecl check` prints the plan of a run, and refuses what would stop it."""

from __future__ import annotations

import gc
import json
from unittest import mock

import pytest

from safecl.commands import spinner
from safecl.exits import ExitCode


def test_check_tells_rows_steps_supervision_methods_stage_and_one_example(run, task_config, tmp_path):
    ema = {"ema": {"horizon": 0.3}}
    code, out, _ = run(
        "check", task_config(methods=ema, train={"max_steps": 80, "allow_few_steps": False}, deepspeed={"stage": 3})
    )
    assert code == ExitCode.DONE
    for expected in (
        "1,049,728 (llama)",
        "1,200 rows",
        "11% supervised",
        "80 of about 320 tokens",
        "epochs",
        "stage 3",
        "leaves",
        "{+",
    ):
        assert expected in out, expected
    assert not (tmp_path / "out").exists()


def test_the_log_of_a_check_that_takes_long_says_that_it_is_at_work(run, task_config, monkeypatch):
    monkeypatch.setattr(spinner, "SECONDS", 0.05)
    _, out, err = run("check", task_config())
    assert "still checking, for" in err and "still" not in out


def test_check_does_slow_work_once_and_leaves_the_collector_as_it_was(run, task_config, monkeypatch):
    """Held-out rows are encoded once, however many layouts the plan compares; nothing is collected meanwhile."""
    from safecl.planning import model_checks

    collects, encode_rows = [], model_checks.encode_rows
    encode = mock.Mock(side_effect=lambda *given: collects.append(gc.isenabled()) or encode_rows(*given))
    monkeypatch.setattr("safecl.evaluation.task.encode_rows", encode)
    monkeypatch.setattr(model_checks, "encode_rows", encode)
    assert run("check", task_config())[0] == ExitCode.DONE
    assert collects == [False] and gc.isenabled()


def test_check_names_file_and_line_of_a_bad_row(run, task_config, tmp_path):
    bad = tmp_path / "bad.jsonl"
    rows = [json.dumps({"prompt": f"a{i}", "completion": "b"}) for i in range(4)]
    bad.write_text("\n".join([*rows[:2], '{"prompt": "half', *rows[2:]]))
    code, _, err = run("check", task_config(tasks=[{"name": "t", "train": str(bad)}]))
    assert code == ExitCode.USAGE
    assert f"{bad}" in err and "3" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ([{"name": "t", "train": "none.jsonl"}], "none.jsonl"),
        ([{"name": "t", "train": "empty.jsonl"}], "empty.jsonl"),
        ([{"name": "t", "train": "."}], "."),
    ],
)
def test_check_refuses_missing_and_empty_files(run, task_config, tmp_path, monkeypatch, tasks, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    code, _, err = run("check", task_config(tasks=tasks))
    assert code == ExitCode.USAGE
    assert expected in err and "Traceback" not in err


def test_check_refuses_few_steps_unless_they_are_allowed(run, task_config):
    code, _, err = run("check", task_config(train={"allow_few_steps": False}))
    assert code == ExitCode.USAGE and "only 3 optimizer steps" in err
    code, out, _ = run("check", task_config())
    assert code == ExitCode.DONE and "only 3 optimizer steps" in out


def test_check_refuses_evaluation_prompts_that_stand_in_the_training_data(run, task_config, materials):
    data = materials.folder / "data"
    code, _, err = run(
        "check",
        task_config(
            tasks=[{"name": "t", "train": str(data / "align.jsonl")}], safety={"prompts": str(data / "align.jsonl")}
        ),
    )
    assert code == ExitCode.USAGE and "align.jsonl" in err


def test_check_refuses_a_model_that_is_none_and_names_a_tokenizer_that_is_too_large(
    run, task_config, materials, tmp_path
):
    from safecl.demo.model import train_tokenizer

    empty = tmp_path / "nothing"
    empty.mkdir()
    code, _, err = run("check", task_config(model={"path": str(empty)}))
    assert code == ExitCode.USAGE and str(empty) in err
    train_tokenizer([f"word{i} other{i}" for i in range(3000)], 2000).save_pretrained(tmp_path / "large")
    code, out, _ = run("check", task_config(model={"tokenizer": str(tmp_path / "large")}))
    assert code == ExitCode.DONE and "the model knows only 1,024; none of the others occurs" in out


def test_check_tells_epochs_as_they_are(run, task_config):
    """Steps of an epoch are rounded up, so that steps times tokens would tell 2.2 of exactly 2."""
    train = {"epochs": 2, "max_steps": None, "tokens_per_batch": 7000}
    code, out, _ = run("check", task_config(train=train))
    assert code == ExitCode.DONE and ", 2 epochs" in out, out


def test_check_tells_a_mean_of_the_loss_that_is_not_the_default(run, task_config):
    told = {mean: run("check", task_config(train={"loss_mean": mean}))[1] for mean in ("tokens", "rows", "capped")}
    assert "mean over" not in told["tokens"] and "mean over rows" in told["rows"]
    assert "mean over tokens; rows with more than" in told["capped"]


def test_check_names_the_rows_without_a_guards_score_and_reads_those_of_a_file(run, task_config, tmp_path):
    scores = tmp_path / "guard.jsonl"
    path = task_config(methods={"star": {}})
    code, _, err = run("check", path)
    assert code == ExitCode.USAGE and "task.jsonl:1: has no score `guard`" in " ".join(err.split())
    assert "and 1,192 more rows" in " ".join(err.split())
    code, _, err = run("check", path, f"methods.star.scores={scores}")
    assert code == ExitCode.USAGE and f"methods.star.scores: {scores}: no such file" in " ".join(err.split())
    scores.write_text('{"guard": [1, 0.5]}\n' * 1200)
    assert run("check", path, f"methods.star.scores={scores}")[0] == ExitCode.DONE
