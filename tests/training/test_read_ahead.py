"""Steps in a run: their rows are read ahead, and draws that follow losses see those of all ranks."""

from __future__ import annotations

import threading
from unittest import mock

import numpy as np
import pytest
import torch

from safecl.replay import ReplayBuffer
from tests.engine.scenes import begin, build_run, random_dataset, run_config, tiny_model

STEPS = 6


def follow(draw: str, methods: dict, learning_rate: float = 1e-2, **changes) -> dict:
    """Keys that each step drew, by stream, and what the memory knows of its rows' losses in the end."""
    config = run_config(
        methods=methods, memory={"draw": draw, "damage_margin": 0.05}, train={"learning_rate": learning_rate}, **changes
    )
    run, task = build_run(config)
    begin(run, task)
    drawn, drew = [], ReplayBuffer.draw

    def noted(buffer, step, num_tokens, stream):
        keys = drew(buffer, step, num_tokens, stream)
        drawn.append((step, stream, keys))
        return keys

    with mock.patch.object(ReplayBuffer, "draw", noted):
        for _ in range(STEPS):
            run.train_step(task)
        run.close()
    buffer = run.memory.buffer
    buffer.drawer.scores.use_until(STEPS, buffer.table, buffer.drawer._classes.of_row, buffer.drawer._classes.names)
    return {
        "drawn": [entry for entry in drawn if entry[0] < STEPS],
        "scores": buffer.table["score"].copy(),
        "keys": buffer.keys(),
    }


@pytest.mark.parametrize(
    ("draw", "methods"),
    [("loss_aware", {"er": {}, "agem": {}}), ("mix_cd", {"derpp": {}})],
    ids=["loss_aware, er, agem", "mix_cd, derpp"],
)
def test_draws_that_follow_losses_are_the_same_on_one_rank_and_on_two_in_zero_3(rank_pool, draw, methods):
    one = rank_pool(1).run(follow, draw=draw, methods=methods)[0]
    two = rank_pool(2).run(follow, draw=draw, methods=methods, deepspeed={"stage": 3})
    assert one["drawn"] == two[0]["drawn"] == two[1]["drawn"]
    assert np.array_equal(two[0]["scores"], two[1]["scores"], equal_nan=True)
    assert np.allclose(one["scores"], two[0]["scores"], rtol=1e-4, equal_nan=True)
    drawn = {key for _, _, keys in one["drawn"] for key in keys}
    assert set(np.array(one["keys"])[~np.isnan(one["scores"])].tolist()) == drawn, (
        "every replayed row has a loss, and no other"
    )


def test_the_losses_that_are_logged_are_those_of_the_rows(rank_pool):
    found = rank_pool(2).run(follow, draw="loss_aware", methods={"er": {}}, learning_rate=0.0)[0]
    model, data = tiny_model().double(), random_dataset(20, seed=2)
    assert (~np.isnan(found["scores"])).any()
    for i, score in enumerate(found["scores"]):
        if not np.isnan(score):
            row = data.row(i)
            ids = torch.from_numpy(row.input_ids.astype(np.int64))
            with torch.no_grad():
                log_probs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            nll = -log_probs.gather(1, ids[1:, None])[:, 0][torch.from_numpy(row.loss_mask[1:].copy())].mean()
            assert score == pytest.approx(float(nll), rel=1e-5)


def readers(methods: dict) -> list[set[str]]:
    """Names of the threads that read rows of the memory in each step."""
    run, task = build_run(run_config(methods=methods))
    begin(run, task)
    seen, get = [], ReplayBuffer.get

    def noted(buffer, key):
        seen[-1].add(threading.current_thread().name.split("_")[0])
        return get(buffer, key)

    with mock.patch.object(ReplayBuffer, "get", noted):
        for _ in range(4):
            seen.append(set())
            run.train_step(task)
        run.close()
    return seen


def test_no_step_reads_the_memory_itself(rank_pool):
    for methods in ({"derpp": {}}, {"er": {}, "agem": {}}):
        seen = rank_pool(1).run(readers, methods=methods)[0]
        assert set().union(*seen) == {"safecl-prefetch"}
