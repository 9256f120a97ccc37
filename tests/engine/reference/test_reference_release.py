"""The reference weights are given back as soon as no method reads them any more, in a resumed run as in an undisturbed
one."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from unittest import mock

import pytest

from safecl.engine.zero.state_placement import needs_reference
from tests.distributed import stop_scenes
from tests.distributed.test_stopping import what_is_left
from tests.engine import scenes
from tests.engine.reference.test_reference import mapped_segments

SIGNS = {"sign_batches": 2, "rows_per_batch": 4}
STEPS = 2


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    from safecl.demo.materials import write_materials

    folder = tmp_path_factory.mktemp("demo")
    write_materials(folder)
    return folder


def tree(materials: Path, output: Path, methods: dict, stage: int, offload: str) -> dict:
    """Two tasks of two steps each, in bf16; nothing is measured."""
    data = materials / "data"
    return {
        "model": {"path": str(materials / "random-model"), "dtype": "bf16", "gradient_checkpointing": False},
        "tasks": [
            {"name": "first", "train": str(data / "task.jsonl")},
            {"name": "second", "train": str(data / "align.jsonl")},
        ],
        "memory": {"source": str(data / "memory.jsonl"), "max_rows": 12, "replay_ratio": 0.5, "max_tokens": 64},
        "methods": methods,
        "train": {
            "max_steps": STEPS,
            "tokens_per_batch": 150,
            "tokens_per_microbatch": 256,
            "max_length": 64,
            "learning_rate": 1e-3,
            "allow_few_steps": True,
        },
        "deepspeed": {"stage": stage, "offload": {"optimizer": offload}},
        "checkpoint": {"every": 1},
        "output": str(output),
    }


def fit_and_watch(tree: dict, cache: str, stops: list[dict | None]) -> list[tuple[int, int, int]]:
    """Steps of a run: number, bytes of the store by the run's count, and number of its segments that this process
    maps."""
    from safecl.training.run import Run

    train_step, seen, before = Run.train_step, [], mapped_segments()  # other tests may have left models in this process

    def watching(self, task):
        gc.collect()
        store = self.engine.store
        seen.append((self.global_step, store.nbytes if store is not None else 0, len(mapped_segments() - before)))
        return train_step(self, task)

    with mock.patch.object(Run, "train_step", watching):
        for stop in stops:
            stop_scenes.fit(tree, cache, stop)
            before |= mapped_segments()
    return seen


ONLINE = {"online_ewc": {"strength": 0.5, **SIGNS}}
BOTH = ONLINE | {"l2_sp": {"modules": "attention"}}


@pytest.mark.parametrize(
    ("methods", "stage", "offload", "moves"),
    [pytest.param(ONLINE, 3, "none", True, marks=pytest.mark.long), (BOTH, 2, "cpu", False)],
)
def test_once_the_anchor_has_moved_the_store_is_gone_also_after_a_resume(
    rank_pool, materials, tmp_path, methods, stage, offload, moves
):
    """A run that is stopped at the end of the first task and in the second one is bit for bit the undisturbed run, with
    as much memory at every step."""
    cache, pool, shm = str(materials / "cache"), rank_pool(2), set(os.listdir("/dev/shm"))
    arguments = dict(methods=methods, stage=stage, offload=offload)
    whole = pool.run(fit_and_watch, tree=tree(materials, tmp_path / "whole", **arguments), cache=cache, stops=[None])
    stops = [dict(rank=step % 2, name="SIGTERM", step=step) for step in (STEPS, STEPS + 1)]
    pieces = pool.run(
        fit_and_watch, tree=tree(materials, tmp_path / "pieces", **arguments), cache=cache, stops=[*stops, None]
    )
    for rank, seen in enumerate(whole):
        assert [number for number, *_ in seen] == list(range(2 * STEPS))
        assert all(nbytes > 0 and mapped == 1 for _, nbytes, mapped in seen[:STEPS])
        assert all((nbytes == 0 and mapped == 0) == moves for _, nbytes, mapped in seen[STEPS:])
        assert pieces[rank] == seen
    assert what_is_left(tmp_path / "pieces") == what_is_left(tmp_path / "whole")
    assert {name for name in set(os.listdir("/dev/shm")) - shm if name.startswith("safecl")} == set()


def test_a_run_that_aligns_the_model_itself_keeps_none():
    """Its anchor is what the first task makes."""
    tasks = [{"name": "align", "train": "a", "role": "align"}, {"name": "t", "train": "b"}]
    assert needs_reference(scenes.run_config(methods=BOTH))
    assert not needs_reference(scenes.run_config(methods=BOTH, tasks=tasks))
