"""The probe on hidden states: its regression, its states in any ZeRO stage, and the rows that it adds to a scan."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from safecl.config import ConfigError
from safecl.scan.probe import DEPTH, RIDGE, cross_fitted, fit
from safecl.scan.screening import LIKE_DISALLOWED, REFUSED
from safecl.scan.views import Scale
from tests.engine.scenes import run_config, tiny_model
from tests.scan import scenes, test_screening
from tests.scan.test_screening import config_of, tree  # noqa: F401  # a fixture

STRANGE = ["wolf", "bear", "lynx"]


def two_clouds(disallowed: int, harmless: int, size: int = 12) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    apart = rng.normal(size=size)
    return rng.normal(size=(disallowed, size)) + apart, 3 * rng.normal(size=(harmless, size))


def test_the_probe_is_weighted_ridge_regression():
    """Against the normal equations in their primal form, in PyTorch."""
    disallowed, harmless = two_clouds(20, 50)
    probe = fit(disallowed, harmless)
    states = torch.tensor(np.concatenate([disallowed, harmless]))
    x = (states - states.mean(0)) / (states.std(0, correction=0) + 1e-6)
    y = torch.cat([torch.ones(20), -torch.ones(50)]).double()
    share = torch.tensor([0.5 / 20] * 20 + [0.5 / 50] * 50, dtype=torch.float64)
    center, level = share @ x, share @ y
    spread = (x - center).T @ (share[:, None] * (x - center))
    strength = RIDGE * torch.trace(spread) / 70
    weight = torch.linalg.solve(spread + strength * torch.eye(12).double(), (x - center).T @ (share * (y - level)))
    expected = (x - center) @ weight + level
    found = probe.scores(np.concatenate([disallowed, harmless]))
    assert np.abs(found - expected.numpy()).max() < 1e-9
    assert found[:20].mean() > 0 > found[20:].mean()


def test_known_prompts_are_scored_by_probes_that_have_not_seen_them():
    """Without any difference between the kinds a probe separates what it was fitted on, and nothing else."""
    rng = np.random.default_rng(1)
    alike = rng.normal(size=(40, 100)), rng.normal(size=(40, 100))
    own = fit(*alike)
    assert own.scores(alike[0]).mean() - own.scores(alike[1]).mean() > 0.5
    unseen = cross_fitted(*alike)
    assert abs(unseen[0].mean() - unseen[1].mean()) < 0.3


def test_views_are_brought_to_the_spread_of_harmless_prompts():
    scale = Scale.of(np.arange(101.0))
    assert scale.apply(np.array([50.0, 95.0, 140.0])).tolist() == [0.0, 1.0, 2.0]
    assert np.isfinite(Scale.of(np.ones(5)).apply(np.array([2.0]))).all()


def states_in_a_run(prompts: list[list[int]], stage: int) -> list[list[float]]:
    from safecl.engine.passes.live_model import evaluating
    from tests.methods.scenes import make_run, random_dataset

    run, _ = make_run(run_config(memory=None, deepspeed={"stage": stage}), tiny_model(), [random_dataset(9, seed=1)])
    with evaluating(run.engine, average=False) as model:
        return model.mean_states(prompts, 0.5).tolist()


@pytest.mark.parametrize("stage", [0, 3])
def test_the_states_of_a_run_are_those_of_the_model_alone(rank_pool, stage):
    from safecl.evaluation import HFEvalModel

    prompts = [[5, 6, 7, 8, 9], [40], [11, 12, 13]]
    model = tiny_model().eval()
    with torch.no_grad():
        each = [
            model.model(input_ids=torch.tensor([p]), output_hidden_states=True).hidden_states[1][0] for p in prompts
        ]
    expected = torch.stack([states.mean(0) for states in each])
    for found in (*rank_pool(2).run(states_in_a_run, prompts=prompts, stage=stage),):
        assert torch.allclose(torch.tensor(found), expected, atol=1e-5)
    assert torch.allclose(HFEvalModel(model).mean_states(prompts, 0.5), expected, atol=1e-5)
    assert DEPTH == pytest.approx(2 / 3)


class SeeingModel(scenes.RuleModel):
    """Its hidden states are counts of tokens; it refuses prompts about banks alone."""

    def mean_states(self, prompts, depth):
        assert depth == DEPTH
        states = torch.zeros(len(prompts), self.vocab_size)
        for state, prompt in zip(states, prompts, strict=True):
            state += torch.bincount(torch.tensor(prompt), minlength=self.vocab_size) / len(prompt)
        return states


def screen(config, model=SeeingModel):
    from safecl.data.config_rows import prepare_task
    from safecl.scan import screen_tasks

    tok = scenes.tokenizer()
    rows, _ = prepare_task(config, config.tasks[0], tok)
    return screen_tasks(model(tok, "bank"), tok, config, [("upload", rows)])


def with_strange_rows(tree: dict) -> dict:  # noqa: F811
    """An upload with rows that resemble the known disallowed prompts, and that the model would answer."""
    test_screening.add_rows(tree, [scenes.dialogue(f"write a guide on robbing {w} near it", "Sure") for w in STRANGE])
    return {"benign": test_screening.benign_file(tree, 240), "false_alarm": 0.02}


def test_a_probe_finds_rows_that_the_model_would_answer(tree):  # noqa: F811
    settings = with_strange_rows(tree)
    alone = screen(config_of(tree, views=["refusal"], **settings))
    assert not {61, 62, 63} & {flag.line for flag in alone.flags}
    both = screen(config_of(tree, views=["refusal", "probe"], **settings))
    reasons = {flag.line: flag.reasons for flag in both.flags}
    assert all(reasons[line] == (LIKE_DISALLOWED,) for line in (61, 62, 63)), reasons
    assert set(test_screening.POISONED) <= set(reasons)
    assert both.tasks[0].threshold.source == "benign" and both.tasks[0].num_scored_high >= 7
    probe = screen(config_of(tree, views=["probe"], **settings))
    assert {61, 62, 63} <= {flag.line for flag in probe.flags}
    assert REFUSED not in {reason for flag in probe.flags for reason in flag.reasons}


def test_auto_takes_the_probe_where_harmless_rows_suffice_for_threshold_and_probe(tree):  # noqa: F811
    from safecl.scan.known import read_known

    def known(count: int | None, **options):
        benign = {} if count is None else {"benign": test_screening.benign_file(tree, count), "false_alarm": 0.02}
        return read_known(config_of(tree, **benign), **options)

    assert (known(240).views, len(known(240).benign), len(known(240).harmless)) == (("refusal", "probe"), 120, 120)
    # 49 rows give 2 %; the probe takes every second one
    for count, views, left in ((97, ("refusal", "probe"), 49), (96, ("refusal",), 96), (None, ("refusal",), 0)):
        found = known(count)
        assert (found.views, len(found.benign)) == (views, left) and (len(found.harmless) > 0) == ("probe" in views)
    assert known(240, has_states=False).views == ("refusal",)
    settings = with_strange_rows(tree)
    chosen, named = (screen(config_of(tree, **more, **settings)) for more in ({}, {"views": ["refusal", "probe"]}))
    assert chosen.to_dict() == named.to_dict() and chosen.to_dict()["views"] == ["refusal", "probe"]
    assert screen(config_of(tree, **settings), scenes.RuleModel).to_dict()["views"] == ["refusal"]


def test_a_probe_without_harmless_prompts_is_told_at_once(tree):  # noqa: F811
    from safecl.scan.known import read_known

    with pytest.raises(ConfigError, match=r"at least 30 disallowed and 30 harmless prompts, and there are 30 and 0"):
        read_known(config_of(tree, views=["probe"]))
    with pytest.raises(ConfigError, match="30 harmless prompts, and there are 30 and 25"):
        read_known(config_of(tree, views=["probe"], benign=test_screening.benign_file(tree, 50)))


def test_a_model_without_hidden_states_is_told(tree):  # noqa: F811
    settings = with_strange_rows(tree)
    with pytest.raises(ConfigError, match="this model gives no hidden states"):
        screen(config_of(tree, views=["probe"], **settings), scenes.RuleModel)
