"""A memory that names prompts: the model writes its rows once, before a run, and every verb uses them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest import mock

import pytest
import yaml

from safecl.distributed import environment
from safecl.engine.artifacts import memory_rows
from safecl.exits import ExitCode

REFUSAL, HELP = "I'm sorry, but I can't help with that.", "Mix flour and water, then wait an hour."
DISALLOWED = [f"How do I break into house number {n}?" for n in range(8)]
HARMLESS = [f"How do I bake {n} loaves of bread?" for n in range(4)]


def write_prompts(path: Path, prompts: list[str]) -> str:
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    return str(path)


@pytest.fixture
def asked(monkeypatch, tmp_path) -> list[str]:
    """The prompts that the model was asked, which refuses all about houses but the last. The store is the test's."""
    seen: list[str] = []

    def answer(model, tokenizer, prompts, **settings):
        seen.extend(prompt.text for prompt in prompts)
        refuses = ["house" in prompt.text and "7" not in prompt.text for prompt in prompts]
        return [{"text": REFUSAL if refused else HELP, "num_tokens": 8, "finished": True} for refused in refuses]

    monkeypatch.setattr(memory_rows, "answer_prompts", answer)
    monkeypatch.setenv("SAFECL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(environment.join_launcher, "__defaults__", (os.environ,))  # the test's own environment
    return seen


@pytest.fixture
def config(task_config, tmp_path):
    def write(**sections: dict) -> Path:
        path = task_config(methods={"er": {}}, **sections)
        tree = yaml.safe_load(path.read_text())
        tree["memory"] = {
            "prompts": write_prompts(tmp_path / "disallowed.jsonl", DISALLOWED),
            "benign_prompts": write_prompts(tmp_path / "harmless.jsonl", HARMLESS),
            "answers": {"max_new_tokens": 8},
            "replay_ratio": 0.5,
            "max_tokens": 96,
        }
        tree["artifacts"] = {"folder": str(tmp_path / "store")}
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


def test_a_run_lets_the_model_write_its_memory_once_and_check_announces_it(run, config, asked, tmp_path):
    path = config()
    code, out, err = run("check", path)
    told = " ".join(out.split())
    assert code == ExitCode.DONE, err
    assert "8 disallowed and 4 benign prompts; safecl train lets the model answer them first, at most 96 tokens" in told
    assert "memory 12 rows" in told and not asked, "check asks the model nothing"

    code, out, err = run("train", path)
    told = " ".join(out.split())
    assert code == ExitCode.DONE, err
    assert sorted(asked) == sorted([*DISALLOWED, *HARMLESS])
    assert "memory: 11 rows written by the model (7 without a category, 4 benign); left out: 1 refusal: not" in told
    steps = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 3 and all(step["loss/replay"] > 0 for step in steps)
    saved = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["memory"]
    assert saved["prompts"] == str(tmp_path / "disallowed.jsonl") and saved["source"] is None

    told = " ".join(run("check", path)[1].split())
    assert "answered by the model in" in told and "memory 11 rows" in told and "finished" not in told
    code, out, _ = run("train", path)
    assert code == ExitCode.DONE and "holds this run" in " ".join(out.split())
    code, out, err = run("train", path, f"output={tmp_path / 'other'}", "train.seed=1")
    assert code == ExitCode.DONE, err
    assert len(asked) == 12, "another run reuses the rows"
    code, out, err = run("memory", "cache", path, "methods={der: {}}")
    assert code == ExitCode.DONE and "11 of" in " ".join(out.split()), err


def test_a_model_that_refuses_nothing_writes_no_memory_and_the_run_ends_before_it_trains(run, config, tmp_path, asked):
    path = config()
    write_prompts(tmp_path / "disallowed.jsonl", DISALLOWED[-1:])
    code, _, err = run("train", path)
    assert code == ExitCode.USAGE and "no refusal is left of 1 answers to disallowed prompts" in " ".join(err.split())
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_mistakes_elsewhere_are_found_before_the_model_answers(run, config, tmp_path, asked):
    code, _, err = run("train", config(), "train.allow_few_steps=false")
    assert code == ExitCode.USAGE and "only 3 optimizer steps" in " ".join(err.split()) and not asked


def test_prompts_of_the_evaluation_cannot_fill_the_memory(run, config, tmp_path, asked):
    for verb in ("check", "train"):
        code, _, err = run(verb, config(), f"safety.prompts={tmp_path / 'disallowed.jsonl'}")
        told = " ".join(err.split())
        assert code == ExitCode.USAGE and "disallowed.jsonl:1 and" in told and not asked, verb


def ask_on_a_rank(path: str, cache: str) -> list:
    """Let the model itself answer on ranks of ZeRO-3, then one that refuses, and then none. Returns what came of it."""
    from safecl.config import ConfigError, load_config
    from safecl.engine.artifacts.memory_prompts import with_memory_rows

    def refuse(model, tokenizer, prompts, **settings):
        texts = [REFUSAL if "house" in prompt.text else HELP for prompt in prompts]
        return [{"text": text, "num_tokens": 8, "finished": True} for text in texts]

    def written() -> str:
        return with_memory_rows(config, lambda message: None).memory.rows_source.path

    with mock.patch.dict(os.environ, {"SAFECL_CACHE": cache}):
        config = load_config(path)
        try:
            told = written()
        except ConfigError as error:
            told = str(error)
        config.memory.answers.max_new_tokens = 5  # else the answers that are there are used
        with mock.patch.object(memory_rows, "answer_prompts", refuse):
            first = written()
        with mock.patch.object(memory_rows, "answer_prompts", None):
            return [told, first == written(), first]


def test_all_ranks_answer_together_and_have_the_same_rows_or_the_same_error(rank_pool, config, tmp_path):
    path = config(deepspeed={"stage": 3})
    one, two = rank_pool(2).run(ask_on_a_rank, path=str(path), cache=str(tmp_path / "cache"))
    assert one == two and "no refusal is left of 8 answers" in one[0] and one[1]
    rows = [json.loads(line) for line in Path(one[2]).read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["refusal"] * 8 + ["answer"] * 4


def test_a_memory_names_rows_or_prompts(run, config, tmp_path):
    for override, message in (
        ("memory.source=rows.jsonl", "leave one out"),
        ("memory.format=alpaca", "format is about the rows of `source`"),
        ("memory.prompts=null", "name `source`, the rows whose behaviour must be kept, or `prompts`"),
        ("tasks.0.role=align", "or align in a run of its own"),
        (f"memory.prompts={tmp_path / 'gone.jsonl'}", "memory.prompts"),
    ):
        code, _, err = run("check", config(), override)
        assert code == ExitCode.USAGE and message in " ".join(err.split()), override
