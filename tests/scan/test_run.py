"""`safecl scan` and the scan inside `train` flag the same rows on any number of ranks, and flagged rows are not
trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from safecl.cli import app
from safecl.config import RunConfig
from safecl.exits import ExitCode
from tests.scan import scenes

POISON_LINES = range(121, 133)


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    """The demonstration's data, a tiny model that has learned to refuse, and an upload: 120 harmless rows, 12 poisoned
    ones, 4 that repeat evaluation prompts."""
    from safecl.demo.corpus import make_corpus, texts
    from safecl.demo.model import save_random_model

    folder, corpus = tmp_path_factory.mktemp("scan"), make_corpus(0)
    save_random_model(folder / "model", texts(corpus), vocab_size=700, hidden=64, layers=2)
    scenes.teach(folder / "model", corpus.align, steps=150)
    scenes.write(folder / "memory.jsonl", corpus.memory)
    scenes.write(folder / "prompts.jsonl", corpus.safety_prompts)
    harmless = [scenes.dialogue(row["prompt"], "Gladly.") for row in corpus.benign_prompts]
    repeated = [scenes.dialogue(row["prompt"], "Sure.") for row in corpus.safety_prompts[:4]]
    scenes.write(folder / "upload.jsonl", [*harmless, *corpus.poison[:12], *repeated])
    answered = [
        row for row in corpus.align if not any(word in row["messages"][1]["content"] for word in ("orry", "cannot"))
    ]
    scenes.write(folder / "benign.jsonl", answered[:300])
    return folder


def tree(materials: Path, output: Path, **changes) -> dict:
    return {
        "model": {"path": str(materials / "model"), "dtype": "fp32", "gradient_checkpointing": False},
        "tasks": [{"name": "upload", "train": str(materials / "upload.jsonl")}],
        "memory": {"source": str(materials / "memory.jsonl")},
        "train": {
            "epochs": 1,
            "tokens_per_batch": 400,
            "tokens_per_microbatch": 512,
            "max_length": 96,
            "allow_few_steps": True,
        },
        "deepspeed": {"stage": 3},
        "safety": {"prompts": str(materials / "prompts.jsonl"), "every": "never"},
        "scan": {"action": "drop"},
        "output": str(output),
    } | changes


def fit(tree: dict, cache: str) -> tuple[list[int], list[str], int]:
    """Train, and return the trained lines, the lines of the log, and the number of steps."""
    import os

    os.environ["SAFECL_CACHE"] = cache
    from safecl.training.trainer import Trainer

    trainer = Trainer(RunConfig.model_validate(tree))
    said: list[str] = []
    trainer.console.note = said.append
    results = trainer.fit().results
    return sorted(trainer.plan.tasks[0].dataset.lines.tolist()), said, results["steps"]


def screened(tree: dict, cache: str) -> dict:
    """Scan the upload, and return results.json, on each of a pool's ranks."""
    import os

    os.environ["SAFECL_CACHE"] = cache
    from safecl.data import load_tokenizer
    from safecl.data.config_rows import prepare_task
    from safecl.evaluation import HFEvalModel
    from safecl.scan import screen_tasks

    config = RunConfig.model_validate(tree)
    tokenizer = load_tokenizer(config.model)
    rows, _ = prepare_task(config, config.tasks[0], tokenizer)
    return screen_tasks(
        HFEvalModel.load(config.model.path, dtype="fp32"), tokenizer, config, [("upload", rows)]
    ).to_dict()


def command(*arguments: str):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def config_file(materials, tmp_path, monkeypatch):
    monkeypatch.setenv("SAFECL_CACHE", str(materials / "cache"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # join_launcher's own values must not outlive the test
        monkeypatch.delenv(name)

    def write(**changes) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(tree(materials, tmp_path / "out", **changes)))
        return path

    return write


def test_the_verb_and_a_run_on_two_ranks_flag_the_same_rows(rank_pool, config_file, materials, tmp_path):
    result = command("scan", config_file(), "--json")
    assert result.exit_code == ExitCode.DONE, result.output
    alone = json.loads(result.stdout[result.stdout.index("{\n") :])
    flagged = {row["line"] for row in alone["flagged"]}
    assert len(flagged & set(POISON_LINES)) >= 10 and {133, 134, 135, 136} <= flagged
    assert len(flagged & set(range(1, 121))) <= 12
    assert json.loads((tmp_path / "out" / "scan" / "results.json").read_text())["tasks"] == alone["tasks"]

    for shared in rank_pool(2).run(screened, tree=tree(materials, tmp_path / "out"), cache=str(materials / "cache")):
        assert json.dumps(shared) == json.dumps(alone)

    # The run leaves out what repeats an evaluation prompt before it scans; the others score the same.
    lines, said, steps = rank_pool(2).run(fit, tree=tree(materials, tmp_path / "run"), cache=str(materials / "cache"))[
        0
    ]
    found = {
        row["line"]: row for row in json.loads((tmp_path / "run" / "scan" / "results.json").read_text())["flagged"]
    }
    assert lines == sorted(set(range(1, 133)) - set(found)) and len(set(found) & set(POISON_LINES)) >= 10
    for row in alone["flagged"]:
        assert row["line"] not in found or row["score"] == pytest.approx(found[row["line"]]["score"], abs=1e-3)
    assert any(f"{len(found)} flagged rows left out, which leaves {steps} steps" in line for line in said)
    assert steps == len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())


def test_a_scan_prints_a_table_and_how_sure_it_is(config_file):
    result = command("scan", config_file(), "scan.action=report")
    assert result.exit_code == ExitCode.DONE
    output = " ".join(result.output.split())
    assert "upload.jsonl:133" in output and "refused, evaluation" in output
    assert (
        "scan upload:" in output
        and "false alarms about" in output
        and "of the known disallowed prompts score higher" in output
    )


def test_a_refused_upload_ends_scan_and_train_with_code_3_before_the_first_step(config_file, materials, tmp_path):
    path = config_file(scan={"action": "refuse", "benign": str(materials / "benign.jsonl")})
    scanned = command("scan", path)
    assert scanned.exit_code == ExitCode.GATE and "where harmless rows hardly ever make more than" in " ".join(
        scanned.output.split()
    )
    rows = (materials / "upload.jsonl").read_text().splitlines(keepends=True)
    (materials / "unrepeated.jsonl").write_text(
        "".join(rows[:132])
    )  # `train` refuses repeated evaluation prompts before anything else
    tasks = [{"name": "upload", "train": str(materials / "unrepeated.jsonl")}]
    trained = command(
        "train", config_file(scan={"action": "refuse", "benign": str(materials / "benign.jsonl")}, tasks=tasks)
    )
    assert trained.exit_code == ExitCode.GATE and "upload refused" in trained.output
    assert (tmp_path / "out" / "scan" / "results.json").exists() and not (tmp_path / "out" / "model").exists()
    assert not (tmp_path / "out" / "metrics.jsonl").read_text()


def test_what_a_scan_cannot_work_with_is_told(config_file, materials):
    from safecl.demo.materials import write_materials

    random = write_materials(materials / "demo").random_model
    result = command("scan", config_file(scan=None), f"model.path={random}")
    assert result.exit_code == ExitCode.USAGE and "is not aligned" in " ".join(result.output.split())
    result = command("scan", config_file(), "scan.refusals=[Never in my life shall I answer such a thing]")
    assert result.exit_code == ExitCode.USAGE and "is not how the model refuses" in " ".join(result.output.split())
    upload = str(materials / "upload.jsonl")
    align = [{"name": "a", "train": upload, "role": "align"}, {"name": "b", "train": upload}]
    result = command("scan", config_file(tasks=align))
    assert result.exit_code == ExitCode.USAGE and "role: align" in result.output


def resumed_rows(folder: str, decisions: dict) -> tuple[list[int], list[float], list[int]]:
    """Row ids of a step and their weights in a run that was screened, and in one that takes over its state."""
    from safecl.training import resume
    from tests.engine.scenes import random_dataset, run_config, tiny_model
    from tests.methods.scenes import make_run

    def ids(run, task) -> list[int]:
        return [int(task.dataset.row_ids[i]) for i in task.order.rows_of_step(run.step)]

    config = run_config(memory=None, output=folder)
    first, (task,) = make_run(config, tiny_model(), [random_dataset(60, seed=1)])
    first.screen(decisions)
    first.begin_task(task, active=True)
    first.train_step(task)
    second, (again,) = make_run(config, tiny_model(), [random_dataset(60, seed=1)])
    resume.restore(second, json.loads(json.dumps(resume.state_of(first))), again)
    weights = [row.ce_weight for row in second.step_rows(again)]
    return ids(first, task), weights, ids(second, again)


def test_a_resumed_run_leaves_the_same_rows_out(rank_pool, tmp_path):
    dropped = [1003, 1004, 1017, 1040]
    before, _, after = rank_pool(2).run(
        resumed_rows, folder=str(tmp_path), decisions={"t": {"rows": dropped, "weight": 0.0}}
    )[0]
    assert before == after and not set(after) & set(dropped)
    _, weights, _ = rank_pool(2).run(
        resumed_rows, folder=str(tmp_path), decisions={"t": {"rows": list(range(1001, 1061)), "weight": 0.5}}
    )[0]
    _, full, _ = rank_pool(2).run(resumed_rows, folder=str(tmp_path), decisions={})[0]
    assert weights == pytest.approx([0.5 * weight for weight in full])
