"""SBR keeps the last hidden state of prompts as plain PyTorch does, and its prompts are the same on any ranks."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from tests.engine.passes import oracle
from tests.engine.scenes import random_dataset, run_config, tiny_model
from tests.methods import reference, scenes
from tests.methods.test_replay_methods import task_rows

STEPS, WEIGHT, PROMPTS, POOL = 4, 2.0, 3, 5


def prompts_in_order() -> list[np.ndarray]:
    from safecl.data.order import keyed_hash

    memory = random_dataset(20, seed=2)  # a row's key is its place in the stream of inserted rows
    order = np.argsort(keyed_hash(np.arange(20, dtype=np.uint64), "prompts", reference.SEED), kind="stable")
    rows = [memory.row(int(i)) for i in order]
    found = [row.input_ids[: int(np.flatnonzero(row.loss_mask)[0])] for row in rows]
    return [prompt for prompt in found if len(prompt)][:POOL]


def state_behind(model, prompt) -> torch.Tensor:
    ids = torch.from_numpy(prompt.astype("int64"))[None]
    return model.model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]


def expected(weight: float, rotating: bool = True):
    student = tiny_model()
    frozen = copy.deepcopy(student)
    prompts = prompts_in_order()

    def distance(step: int) -> torch.Tensor:
        chosen = [prompts[(step * PROMPTS * rotating + i) % POOL] for i in range(PROMPTS)]
        with torch.no_grad():
            said = [state_behind(frozen, prompt) for prompt in chosen]
        squares = [(state_behind(student, p) - s).square().mean() for p, s in zip(chosen, said, strict=True)]
        return torch.stack(squares).mean()

    losses = [
        lambda step=step, rows=rows: reference.mean_nll(student, rows) + weight * distance(step)
        for step, rows in enumerate(task_rows(random_dataset(60, seed=1), STEPS))
    ]
    return reference.train(student, losses)


@pytest.mark.parametrize("stage", [2, 3])
def test_sbr_equals_a_frozen_copy_on_rotating_prompts(rank_pool, tmp_path, stage):
    found = rank_pool(2).run(
        scenes.train,
        steps=STEPS,
        methods={"sbr": {"weight": WEIGHT, "prompts": PROMPTS, "pool": POOL}},
        deepspeed={"stage": stage},
        output=str(tmp_path),
    )[0]
    start = {name: p.detach() for name, p in tiny_model().named_parameters()}
    assert oracle.relative_distance(found["weights"], expected(WEIGHT), start) <= 1e-3
    assert oracle.relative_distance(found["weights"], expected(WEIGHT, rotating=False), start) > 1e-2
    assert abs(found["losses"][0]["sbr"]) < 1e-6 < min(losses["sbr"] for losses in found["losses"][1:])


class WordTokenizer:
    """Decodes one token as a refusal and every other as an answer."""

    def __init__(self, refusing: int):
        self.refusing = refusing

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "I'm sorry, I can't help with that." if self.refusing in ids else "Sure, here you are."


def chosen(refusing: int) -> list[list[int]]:
    from safecl.training.recorded.prompts import _choose

    rows = scenes.dataset_of([([20 + i, 30 + i, 3 + i % 2], [False, False, True]) for i in range(12)], 1)
    config = run_config()
    run, _ = scenes.make_run(config, tiny_model(), [random_dataset(20, seed=1)], rows)
    return [prompt.tolist() for prompt in _choose(run.memory, WordTokenizer(refusing), 4, seed=3)]


def test_prompts_are_those_of_refused_rows_where_there_are_any(rank_pool):
    (alone,) = rank_pool(1).run(chosen, refusing=4)
    assert rank_pool(2).run(chosen, refusing=4) == [alone, alone] and len(alone) == 4
    assert all(prompt[0] % 2 == 1 for prompt in alone)
    (any_row,) = rank_pool(1).run(chosen, refusing=99)
    assert len(any_row) == 4 and any(prompt[0] % 2 == 0 for prompt in any_row)
