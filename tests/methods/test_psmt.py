"""The masked average: what the Fisher protects stays at the start, the rest is the plain average, and training sees
neither."""

from __future__ import annotations

import pytest
import torch

from safecl.config import ConfigError, validate_tree
from tests.engine import scenes
from tests.engine.passes import oracle

SIGNS = {"sign_batches": 4, "rows_per_batch": 4}
PLACES = [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)]


def train(steps: int = 4, **changes):
    run, task = scenes.make_run(scenes.run_config(**changes))
    for _ in range(steps):
        run.train_step(task)
    thresholds = [method.threshold for method in run.methods if hasattr(method, "threshold")]
    return scenes.state_of(run), thresholds, run.engine.shards.numel


def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.view(-1) for value in state.values()])


@pytest.mark.parametrize(("world_size", "stage"), PLACES)
@pytest.mark.parametrize("decay_protected", [1.0, 0.5])
def test_protected_weights_have_their_own_decay_and_all_others_the_plain_average(
    rank_pool, world_size, stage, decay_protected
):
    settings = {"decay": 0.9, "protected": 0.2, "decay_protected": decay_protected, **SIGNS}
    ranks = rank_pool(world_size).run(train, methods={"psmt": settings}, deepspeed={"stage": stage})
    plain, fast = (
        rank_pool(world_size).run(train, methods={"ema": {"decay": decay}}, deepspeed={"stage": stage})[0][0]
        for decay in (0.9, decay_protected)
    )
    for state, (threshold,), numel in ranks:
        fisher = flat(state["fisher"])
        allowed = int(0.2 * numel)
        assert int((fisher > threshold).sum()) <= allowed < int((fisher >= threshold).sum())
        assert torch.equal(flat(state["weights"]), flat(plain["weights"]))
        protected = fisher > threshold
        assert torch.equal(flat(state["ema"])[protected], flat(fast["ema"])[protected])
        assert torch.equal(flat(state["ema"])[~protected], flat(plain["ema"])[~protected])
        assert decay_protected == 0.9 or not torch.equal(flat(state["ema"]), flat(plain["ema"]))


@pytest.mark.parametrize("scope", ["task", "total"])
@pytest.mark.parametrize(
    "penalties", [{"ewc": {"strength": 0.5, **SIGNS}}, {"l2_sp": {"strength": 0.3}, "ewc": {"strength": 0.5, **SIGNS}}]
)
def test_penalties_of_any_fisher_work_beside_the_mask(rank_pool, scope, penalties):
    """The penalty that cannot be in the pass joins the gradient before it; the weights are those of the plain average's
    run."""
    train_section = {"clip_scope": scope}
    masked, plain = (
        rank_pool(2).run(train, methods=penalties | average, train=train_section)[0][0]
        for average in ({"psmt": {"decay": 0.9, **SIGNS}}, {"ema": {"decay": 0.9}})
    )
    start = {name: p.detach() for name, p in scenes.tiny_model().named_parameters()}
    assert oracle.relative_distance(masked["weights"], plain["weights"], start) <= 1e-4


def refusal(**methods) -> str:
    tree = scenes.run_config().model_dump(mode="json") | {"methods": methods}
    with pytest.raises(ConfigError) as error:
        validate_tree(tree, "run.yaml")
    return str(error.value)


def test_what_does_not_go_together_is_refused():
    assert "psmt and ema each keep an average" in refusal(psmt={}, ema={})
    assert "l2_sp.proximal cannot be combined with psmt" in refusal(psmt={}, l2_sp={"proximal": True})
