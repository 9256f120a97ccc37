"""Whole runs that are stopped, killed, or started twice: the same command finishes them, and nothing is overwritten."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest

from tests.distributed import stop_scenes
from tests.pool import RankPool

WALL_CLOCK = {"tokens_per_second", "memory_bytes", "time", "finished", "seconds", "cost"}


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    """The demonstration's data and random model, with few evaluation prompts."""
    from safecl.demo.materials import write_materials

    folder = tmp_path_factory.mktemp("demo")
    write_materials(folder)
    for name in ("safety-prompts.jsonl", "task-test.jsonl"):
        lines = (folder / "data" / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "data" / name).write_text("".join(lines[:3]), encoding="utf-8")
    return folder


def tree(materials: Path, output: Path, **changes) -> dict:
    """An alignment task and then one with methods; both measured, the second in between as well."""
    data = materials / "data"
    config = {
        "model": {"path": str(materials / "random-model"), "dtype": "fp32", "gradient_checkpointing": False},
        "tasks": [
            {"name": "align", "train": str(data / "align.jsonl"), "role": "align"},
            {"name": "sentiment", "train": str(data / "task.jsonl")},
        ],
        "memory": {
            "source": str(data / "memory.jsonl"),
            "max_rows": 12,
            "replay_ratio": 0.5,
            "max_tokens": 64,
            "teacher": {"k": 4},
        },
        "methods": {"der": {}, "ewc": {"sign_batches": 2, "rows_per_batch": 4}, "ema": {"decay": 0.7}},
        "train": {
            "max_steps": 5,
            "tokens_per_batch": 150,
            "tokens_per_microbatch": 256,
            "max_length": 64,
            "learning_rate": 1e-3,
            "allow_few_steps": True,
        },
        "deepspeed": {"stage": 2},
        "safety": {"prompts": str(data / "safety-prompts.jsonl"), "max_new_tokens": 3, "every": 3},
        "checkpoint": {"every": 2},
        "output": str(output),
    }
    return config | changes


@pytest.fixture(scope="module")
def whole(rank_pool, materials, tmp_path_factory) -> Path:
    """A run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    rank_pool(2).run(stop_scenes.fit, tree=tree(materials, folder), cache=str(materials / "cache"))
    return folder


def what_is_left(folder: Path) -> dict:
    """Everything that a run leaves for its user, without wall-clock times."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((folder / "results.json").read_text())
    return {
        "metrics": [{key: value for key, value in line.items() if key not in WALL_CLOCK} for line in metrics],
        "results": {key: value for key, value in results.items() if key not in WALL_CLOCK},
        "outputs": {path.name: path.read_text() for path in (folder / "outputs").glob("*")},
        "models": {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("model*/*.safetensors")},
    }


STOPS = [
    dict(rank=1, name="SIGTERM", evaluation=1),  # while the model is measured before anything
    dict(rank=0, name="SIGINT", step=2),
    dict(rank=1, name="SIGUSR1", step=5),  # the last step of the first task
    dict(rank=0, name="SIGTERM", evaluation=2),  # after the first task, then before the second
    dict(rank=1, name="SIGTERM", step=6),
    dict(rank=0, name="SIGUSR1", step=8),  # where the run is also measured
    dict(rank=1, name="SIGINT", step=10),
]


def test_a_run_stopped_by_seven_signals_leaves_exactly_what_the_undisturbed_one_leaves(
    rank_pool, materials, whole, tmp_path
):
    """Two tasks, two ranks, one of which gets the signal: metrics, results, answers, and both models bit for bit.

    In between the run folder is moved, and loses `latest`.
    """
    cache, pool = str(materials / "cache"), rank_pool(2)
    pieces = pool.run(stop_scenes.fit_in_pieces, tree=tree(materials, tmp_path / "run"), cache=cache, stops=STOPS[:5])
    shutil.move(tmp_path / "run", tmp_path / "moved")
    (tmp_path / "moved" / "checkpoints" / "latest").unlink()
    moved = pool.run(
        stop_scenes.fit_in_pieces, tree=tree(materials, tmp_path / "moved"), cache=cache, stops=[*STOPS[5:], None]
    )
    for first, second in zip(pieces, moved, strict=True):
        assert [piece["stopped"] for piece in first + second] == [True] * len(STOPS) + [False]
    asked = [[stop["rank"] == rank for stop in STOPS] + [False] for rank in range(2)]
    assert [[piece["asked"] for piece in pieces[rank] + moved[rank]] for rank in range(2)] == asked
    assert what_is_left(tmp_path / "moved") == what_is_left(whole)
    assert "a signal: stopped after step 0" in pieces[0][0]["said"]  # rank 0 speaks, rank 1 had the signal
    assert "resuming from step-00000002, step 2" in pieces[0][2]["said"]


def test_a_run_killed_in_its_second_task_and_moved_to_one_rank_finishes(materials, rank_pool, whole, tmp_path):
    config, cache = tree(materials, tmp_path / "run"), str(materials / "cache")
    for step in (8,):
        pool = RankPool(2, forked=True)
        for pipe in pool.pipes:
            pipe.send((stop_scenes.end_all_ranks_at, dict(tree=config, cache=cache, step=step)))
        for process in pool.processes:
            process.join(120)
            assert process.exitcode == -9
    rank_pool(1).run(stop_scenes.fit, tree=config | {"deepspeed": {"stage": 3}}, cache=cache)
    left, expected = what_is_left(tmp_path / "run"), what_is_left(whole)
    assert [line["tokens"] for line in left["metrics"]] == [line["tokens"] for line in expected["metrics"]]
    assert (
        left["metrics"][:5] == expected["metrics"][:5]
    )  # the first task, which was saved on two ranks before the kill
    assert left["results"]["steps"] == 10 and left["models"].keys() == expected["models"].keys()


def test_the_run_folder_keeps_the_exit_code_that_a_launcher_may_swallow(rank_pool, materials, tmp_path):
    config = tree(materials, tmp_path / "run", methods={}, memory=None, safety=None)
    stop = dict(rank=0, name="SIGUSR1", step=3)
    codes = rank_pool(1).run(stop_scenes.exit_codes_of, tree=config, cache=str(materials / "cache"), stop=stop)[0]
    assert codes == [(75, "75\n"), (0, "0\n")]


def test_a_finished_run_is_reported_and_not_trained_again(rank_pool, materials, whole):
    before = {
        path: path.stat().st_mtime_ns
        for path in whole.rglob("*")
        if path.is_file() and path.name not in ("run.lock", "exit_code")
    }
    again = rank_pool(1).run(stop_scenes.fit, tree=tree(materials, whole), cache=str(materials / "cache"))[0]
    assert "finished after 10 steps" in again["said"] and again["results"] == json.loads(
        (whole / "results.json").read_text()
    )
    assert before == {
        path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file() and path.name != "run.lock"
    }


def test_fresh_refuses_a_folder_that_holds_a_run_and_says_how_to_set_it_aside(rank_pool, materials, whole):
    message = rank_pool(1).run(
        stop_scenes.refused, tree=tree(materials, whole), cache=str(materials / "cache"), fresh=True
    )[0]
    assert "2 checkpoints, model, model-live, results.json" in message and f"mv {whole} {whole}-1" in message


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train": {"learning_rate": 2e-3}}, "train.learning_rate: 0.001 then, 0.002 now"),
        ({"methods": {"der": {}}}, "methods.ewc: {"),
        ({"tasks": [{"name": "sentiment", "train": "DATA/task.jsonl"}]}, "tasks: [{"),
        ({"memory": {"max_rows": 11}}, "memory.max_rows: 12 then, 11 now"),
    ],
)
def test_another_config_in_the_folder_is_refused_by_the_names_of_the_keys(rank_pool, materials, whole, changes, told):
    config = tree(materials, whole)
    for section, values in changes.items():
        config[section] = {**config[section], **values} if isinstance(values, dict) and section != "methods" else values
    config = json.loads(json.dumps(config).replace("DATA", str(materials / "data")))
    message = rank_pool(1).run(stop_scenes.refused, tree=config, cache=str(materials / "cache"))[0]
    assert told in message and "start a new run with another `output`" in message


def test_where_files_lie_and_how_fast_it_is_computed_may_change(rank_pool, materials, whole):
    data = shutil.copytree(materials / "data", materials / "moved", dirs_exist_ok=True)
    config = tree(materials, whole, deepspeed={"stage": 3}, log={"every": 7}, checkpoint={"keep": 1})
    config["tasks"][1] = config["tasks"][1] | {"train": str(data / "task.jsonl")}
    assert "finished after" in rank_pool(1).run(stop_scenes.fit, tree=config, cache=str(materials / "cache"))[0]["said"]


def test_rows_that_changed_since_the_run_began_are_refused(rank_pool, materials, whole):
    data = shutil.copytree(materials / "data", materials / "changed", dirs_exist_ok=True)
    lines = (data / "task.jsonl").read_text().splitlines(keepends=True)
    (data / "task.jsonl").write_text("".join(lines[1:]))
    config = tree(materials, whole)
    config["tasks"][1] = config["tasks"][1] | {"train": str(data / "task.jsonl")}
    message = rank_pool(1).run(stop_scenes.refused, tree=config, cache=str(materials / "cache"))[0]
    assert "the rows of task sentiment have changed" in message


def test_another_base_model_than_before_the_stop_is_refused(rank_pool, materials, tmp_path):
    config = tree(materials, tmp_path / "run", methods={}, memory=None, safety=None)
    rank_pool(1).run(
        stop_scenes.fit, tree=config, cache=str(materials / "cache"), stop=dict(rank=0, name="SIGTERM", step=2)
    )
    model = Path(shutil.copytree(materials / "random-model", tmp_path / "model"))
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (model / "model.safetensors").write_bytes(data)
    config["model"] = config["model"] | {"path": str(model)}
    message = rank_pool(1).run(stop_scenes.refused, tree=config, cache=str(materials / "cache"))[0]
    assert "the weights of model.path have changed since this run began" in message


def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_is_taken(rank_pool, materials, tmp_path):
    config, cache = tree(materials, tmp_path / "run"), str(materials / "cache")
    pool, checkpoints = (
        rank_pool(2),
        tmp_path / "run" / "checkpoints",
    )  # the hashes of a file are compared by one of them
    pool.run(stop_scenes.fit, tree=config, cache=cache, stop=dict(rank=0, name="SIGTERM", step=4))
    newest, before = sorted(checkpoints.glob("step-*"), reverse=True)
    data = bytearray((newest / "rank-00000.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (newest / "rank-00000.safetensors").write_bytes(data)
    said = pool.run(stop_scenes.fit, tree=config, cache=cache, stop=dict(rank=0, name="SIGTERM", step=3))[0]["said"]
    assert f"checkpoint {newest.name} is damaged" in said and "its bytes are not those that were written" in said
    assert f"resuming from {before.name}" in said
    # and where none is whole, nothing is begun anew behind the user's back
    for path in checkpoints.glob("step-*/manifest.json"):
        path.write_bytes(b"")
    assert "no checkpoint is whole" in pool.run(stop_scenes.refused, tree=config, cache=cache)[0]


def test_a_disk_without_room_for_a_checkpoint_costs_the_checkpoint_and_not_the_run(rank_pool, materials, tmp_path):
    config, cache = tree(materials, tmp_path / "run"), str(materials / "cache")
    said = rank_pool(1).run(stop_scenes.fit_on_a_full_disk, tree=config, cache=cache)[0]["said"]
    assert said.count("could not be saved") >= 4 and "are free" in said and (tmp_path / "run" / "model").is_dir()
    config["output"] = str(tmp_path / "second")
    stop = dict(rank=0, name="SIGTERM", step=3)
    message = rank_pool(1).run(stop_scenes.fit_on_a_full_disk, tree=config, cache=cache, stop=stop)[0]
    assert "SIGTERM stopped the run after step 3" in message and "could not be saved" in message


def test_a_second_process_on_a_run_folder_is_refused_20_times_of_20_and_the_lock_dies_with_its_holder(tmp_path):
    from safecl.training.folder import RunFolder

    held = RunFolder(tmp_path)
    assert held.lock() is None
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        messages = [pool.apply(stop_scenes.leave_lock, (str(tmp_path),)) for _ in range(20)]
        assert all("is in use by process" in message and "choose another folder" in message for message in messages)
        held.release()
        assert pool.apply(stop_scenes.leave_lock, (str(tmp_path),)) == ""


def test_a_folder_that_cannot_be_made_is_a_message():
    assert "cannot be written" in stop_scenes.leave_lock("/proc/run")
