"""Rows and tokens that are selected before training, or weighed by their losses, train what their equations say."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from safecl.config import ConfigError, validate_tree
from safecl.methods.weighting.bds import Config as BdsConfig
from safecl.methods.weighting.bds import Method as Bds
from tests.engine.passes import oracle
from tests.methods import every_method, reference, scenes
from tests.methods.fp64_scene import Scene
from tests.methods.test_weighting import answer_log_probs


def found_by(rank_pool, folder, method: str, stage: int, **changes) -> dict:
    run = rank_pool(2).run(
        every_method.train, method=method, folder=str(folder), deepspeed={"stage": stage}, **changes
    )[0]
    return run["state"]["weights"]


def train(scene: Scene, loss_of_step) -> dict:
    losses = [lambda rows=rows, step=step: loss_of_step(step, rows) for step, rows in enumerate(scene.task)]
    return reference.train(scene.model, losses)


def all_rows() -> list:
    data = scenes.conflicting_datasets()[0]
    return list(data.rows(range(len(data))))


# ------------------------------------------------------------------------------------------------------- gradient norm


def head_gradient(model, row) -> torch.Tensor:
    """d (mean NLL of the row) / d (weight of a copy of the head), by autograd."""
    head = copy.deepcopy(model.lm_head)
    with torch.no_grad():
        hidden = reference.hidden_states(model, row)[:-1]
    mask = torch.from_numpy(row.loss_mask[1:].copy())
    targets = torch.from_numpy(row.input_ids[1:].astype("int64"))
    loss = torch.nn.functional.cross_entropy(head(hidden[mask]), targets[mask])
    return torch.autograd.grad(loss, head.weight)[0]


def test_rows_with_large_gradients_are_left_out(rank_pool, tmp_path):
    scene = Scene()
    norms = {row.row_id: float(head_gradient(scene.model, row).norm()) for row in all_rows()}
    limit = np.quantile(list(norms.values()), 0.5)

    def loss(step: int, rows) -> torch.Tensor:
        kept = [row for row in rows if norms[row.row_id] <= limit]
        assert 0 < len(kept) < len(rows)
        return reference.mean_nll(scene.model, kept)

    end = train(scene, loss)
    assert oracle.relative_distance(end, Scene().train(), scene.start) > 0.02
    assert oracle.relative_distance(found_by(rank_pool, tmp_path, "gradient_norm", 3), end, scene.start) <= 1e-3


# ---------------------------------------------------------------------------------------------------------------- TOSS


@pytest.mark.parametrize("mean", ["tokens", "rows"])
def test_tokens_that_the_degraded_model_prefers_are_left_out(rank_pool, tmp_path, mean):
    scene, (degraded, utility) = Scene(), (scenes.other_model(seed).double() for seed in "45")
    with torch.no_grad():
        risks = {row.row_id: answer_log_probs(degraded, row) - answer_log_probs(utility, row) for row in all_rows()}
    limit = torch.cat(list(risks.values())).quantile(0.6)

    def loss(step: int, rows) -> torch.Tensor:
        kept = [oracle.row_nll(scene.model, row)[risks[row.row_id] <= limit] for row in rows]
        kept = [nll for nll in kept if len(nll)]
        return torch.cat(kept).mean() if mean == "tokens" else torch.stack([nll.mean() for nll in kept]).mean()

    end = train(scene, loss)
    assert oracle.relative_distance(end, Scene().train(), scene.start) > 0.02
    found = found_by(rank_pool, tmp_path, "toss", 2, train=TRAIN | {"loss_mean": mean})
    assert oracle.relative_distance(found, end, scene.start) <= 1e-3


TRAIN = {"tokens_per_batch": 96, "tokens_per_microbatch": 32, "max_length": 32, "max_steps": every_method.STEPS}


def test_a_model_that_scores_must_be_named():
    tree = {"model": {"path": "m"}, "tasks": [{"name": "a", "train": "a.jsonl"}], "output": "runs/a"}
    with pytest.raises(ConfigError, match=r"toss needs `toss: {utility: MODEL}`, a folder or hub id"):
        validate_tree(tree | {"methods": {"toss": {"degraded": "d"}}}, "run.yaml")


# ----------------------------------------------------------------------------------------------------------------- BDS


def test_weights_follow_the_losses_of_the_steps_up_to_the_last_but_one(rank_pool, tmp_path):
    scene = Scene()
    weights = {row.row_id: 0.0 for row in all_rows()}
    waiting: list[dict[int, float]] = []
    replayed = scene.draws("replay")

    def loss(step: int, rows) -> torch.Tensor:
        if step >= 2:
            seen = waiting[step - 2]
            mean = sum(math.exp(weights[i]) * seen[i] for i in seen) / sum(math.exp(weights[i]) for i in seen)
            weights.update({i: weights[i] - 60.0 * (seen[i] - mean) for i in seen})
        nll = {row.row_id: oracle.row_nll(scene.model, row) for row in rows}
        waiting.append({i: float(own.detach().mean()) for i, own in nll.items()})
        factors = torch.tensor([math.exp(weights[i]) for i in nll for _ in nll[i]], dtype=torch.float64)
        user = (factors * torch.cat(list(nll.values()))).sum() / factors.sum()
        return user + reference.mean_nll(scene.model, replayed[step])

    end = train(scene, loss)
    assert max(map(abs, weights.values())) > 0.3
    assert oracle.relative_distance(found_by(rank_pool, tmp_path, "bds", 1), end, scene.start) <= 1e-3


def test_a_row_is_never_lost_for_ever():
    method = Bds("bds", BdsConfig(rate=10.0, most=2.0))
    method.see_row_losses(0, {0: 9.0, 1: 1.0})
    assert method.learned_factors(1, [0, 1]).tolist() == [1.0, 1.0], "known two steps later"
    assert method.learned_factors(2, [0, 1, 5]).tolist() == pytest.approx([math.exp(-2), math.exp(2), 1.0])
