"""kill -9 of runs that use recorded outputs: the same command ends them like an undisturbed run."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from unittest import mock

import pytest

from tests.distributed import stop_scenes
from tests.distributed.test_stopping import what_is_left
from tests.pool import RankPool


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    from safecl.demo.materials import write_materials

    folder = tmp_path_factory.mktemp("demo")
    write_materials(folder)
    return folder


def tree(materials: Path, output: Path) -> dict:
    """DER with the shared cache of the memory's outputs, LwF with recorded outputs of the task's rows, and an anchor in
    the store."""
    data = materials / "data"
    return {
        "model": {"path": str(materials / "random-model"), "dtype": "bf16", "gradient_checkpointing": False},
        "tasks": [{"name": "sentiment", "train": str(data / "task.jsonl"), "max_rows": 60}],
        "memory": {
            "source": str(data / "memory.jsonl"),
            "max_rows": 12,
            "replay_ratio": 0.5,
            "max_tokens": 64,
            "teacher": {"k": 4},
        },
        "methods": {"der": {}, "lwf": {"outputs": "recorded", "form": "output", "k": 4}, "l2_sp": {}},
        "train": {
            "max_steps": 4,
            "tokens_per_batch": 150,
            "tokens_per_microbatch": 256,
            "max_length": 64,
            "learning_rate": 1e-3,
            "allow_few_steps": True,
        },
        "deepspeed": {"stage": 2},
        "checkpoint": {"every": 2},
        "output": str(output),
    }


def fit_and_die(tree: dict, cache: str, where: str) -> None:
    """Every rank is killed while it writes the cache, while it records, or before the step behind a checkpoint."""
    from safecl.engine.artifacts import teacher_outputs
    from safecl.engine.teachers import recorded
    from safecl.replay import CacheWriter
    from safecl.training.run import Run

    add, pack, train_step, done = CacheWriter.add, recorded.Form.pack, Run.train_step, []
    checkpoint = Path(tree["output"]) / "checkpoints" / "latest"

    def dying(name: str, work, last: int):
        def at_last(*arguments):
            done.append(name)
            if where == name and done.count(name) == last:
                while name == "step" and not checkpoint.exists():
                    time.sleep(0.02)
                os.kill(os.getpid(), signal.SIGKILL)
            return work(*arguments)

        return at_last

    with (
        mock.patch.object(teacher_outputs, "ROWS_AT_ONCE", 2),
        mock.patch.object(CacheWriter, "add", dying("cache", add, 2)),
        mock.patch.object(recorded.Form, "pack", dying("recorded", pack, 9)),
        mock.patch.object(Run, "train_step", dying("step", train_step, 4)),
    ):
        stop_scenes.fit(tree, cache)


@pytest.mark.long
def test_a_run_killed_in_its_cache_its_recording_and_its_steps_ends_like_an_undisturbed_one(
    rank_pool, materials, tmp_path
):
    shm = set(os.listdir("/dev/shm"))
    whole = rank_pool(2).run(stop_scenes.fit, tree=tree(materials, tmp_path / "whole"), cache=str(tmp_path / "one"))[0]
    assert "teacher-cache: built" in whole["said"]
    killed = dict(tree=tree(materials, tmp_path / "killed"), cache=str(tmp_path / "other"))
    for where in ("cache", "recorded", "step"):
        pool = RankPool(2, forked=True)
        for pipe in pool.pipes:
            pipe.send((fit_and_die, killed | {"where": where}))
        for process in pool.processes:
            process.join(120)
        codes = [process.exitcode for process in pool.processes]
        assert -signal.SIGKILL in codes and set(codes) <= {-signal.SIGKILL, 1}, (
            where,
            codes,
        )  # 1: it was waiting for one that had died
    rest = rank_pool(2).run(stop_scenes.fit, **killed)[0]
    assert "resuming from step-00000002" in rest["said"]
    assert what_is_left(tmp_path / "killed") == what_is_left(tmp_path / "whole")
    assert not (tmp_path / "killed" / "teacher").exists() or not any((tmp_path / "killed" / "teacher").iterdir())
    assert {name for name in set(os.listdir("/dev/shm")) - shm if name.startswith("safecl")} == set()
