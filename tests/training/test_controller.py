"""The probe and the controller in a run: every stage, resume, levels that follow the sequence, steered steps."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from safecl.config import ConfigError, ControllerConfig, RunConfig
from safecl.config.run import most_replayed
from safecl.evaluation.answers.margin import REFUSAL, Margins, common_refusal
from safecl.evaluation.statistics.sequential import ConfidenceSequence
from safecl.training.steps.steering import Steering
from tests.training.test_trainer import fit, materials, tree  # noqa: F401  # a fixture

CONTROLLER = {"max_asr_rise": 1.0, "every": 2, "prompts": 4, "replay": [0.5, 1.5], "distillation": [0.25, 2.0]}
"""With a limit that nothing exceeds the level goes down at every look."""


def config(materials: Path, output: Path, **changes) -> dict:  # noqa: F811
    safety = {"probe": {"every": 2, "prompts": 3}, "controller": CONTROLLER, "every": 3}
    given = {"methods": {"der": {"alpha": 1.0, "beta": 0.5}}, "safety": safety, "deepspeed": {"stage": 1}} | changes
    return tree(materials, output, **given)


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses_and_margins(materials, rank_pool, output, ranks, **changes):  # noqa: F811
    results = rank_pool(ranks).run(fit, tree=config(materials, output, **changes), cache=str(materials / "cache"))[0]
    return results, lines_of(output)


@pytest.fixture(scope="module")
def alone(materials, rank_pool, tmp_path_factory):  # noqa: F811
    return losses_and_margins(materials, rank_pool, tmp_path_factory.mktemp("alone"), 1)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_probe_sees_the_same_in_all_stages_and_on_two_ranks(alone, materials, rank_pool, tmp_path, stage):  # noqa: F811
    _, expected = alone
    _, lines = losses_and_margins(materials, rank_pool, tmp_path / "run", 2, deepspeed={"stage": stage})
    assert [line["step"] for line in lines if "probe/margin" in line] == [0, 2, 4]
    for line, other in zip(lines, expected, strict=True):
        for name in ("probe/margin", "controller/mean", "controller/high", "controller/level"):
            assert (name in line) == (name in other)
            assert line.get(name, 0.0) == pytest.approx(other.get(name, 0.0), rel=1e-4, abs=1e-5)


def test_the_results_say_how_well_the_probe_tells_the_generated_rate(alone):
    results, _ = alone
    probed = [each["probe"] for each in results["evaluations"]]
    assert len(probed) == 3 and all(each["asr"]["n"] == 3 for each in probed)
    assert results["summary"]["probe"]["moments"] == 3 and "pearson" in results["summary"]["probe"]


def test_a_level_that_changes_nothing_leaves_the_run_bitwise_as_it_is(materials, rank_pool, tmp_path):  # noqa: F811
    safety = {"every": 3}
    still = safety | {"probe": {"every": 1}, "controller": CONTROLLER | {"replay": [1, 1], "distillation": [1, 1]}}
    _, with_probe = losses_and_margins(materials, rank_pool, tmp_path / "a", 1, safety=still)
    _, without = losses_and_margins(materials, rank_pool, tmp_path / "b", 1, safety=safety)
    names = ("loss/task", "loss/replay", "grad_norm", "learning_rate", "tokens")
    assert [[line[n] for n in names] for line in with_probe] == [[line[n] for n in names] for line in without]


def test_a_run_that_measures_nothing_is_steered_all_the_same(materials, rank_pool, tmp_path):  # noqa: F811
    seen = {}
    for every in (3, "never"):
        safety = {"probe": {"every": 2, "refusal": REFUSAL}, "controller": CONTROLLER, "every": every}
        _, lines = losses_and_margins(materials, rank_pool, tmp_path / str(every), 1, safety=safety)
        seen[every] = [(line["controller/high"], line["controller/level"]) for line in lines]
    assert seen["never"] == seen[3] and len({level for _, level in seen[3]}) > 1


def level_after(values, level=0.5, limit=0.1) -> float:
    from safecl.training.guard.controller import Controller

    settings = ControllerConfig(max_asr_rise=limit)
    controller = Controller(settings, None, 0)
    controller.sequence = ConfidenceSequence(0.0, 1.0, 0.05, 10**6)
    controller.sequence.update(values)
    return controller._level(level)


def test_the_level_goes_up_near_the_limit_down_when_idle_and_to_the_top_beyond_it():
    assert level_after([0.0] * 200) == pytest.approx(0.4)
    assert level_after([0.0] * 40) == 0.5, "neither near nor shown to be calm"
    assert level_after(([1.0] + [0.0] * 14) * 6) == 0.75
    assert level_after([1.0] * 20) == 1.0
    assert level_after([0.0] * 200, level=0.05) == 0.0 and level_after([1.0, 0.0] * 3, level=0.9) == 1.0


def test_a_level_acts_from_the_next_step_on_and_sets_both_factors():
    steering = Steering((0.5, 1.5), (0.25, 2.0))
    assert steering.level(7) == steering.start == 0.5 and steering.share_at(7) == 1.0
    steering.set(8, 1.0)
    assert steering.share_at(7) == 1.0 and steering.share_at(8) == 1.5 and steering.weight_at(9) == 2.0
    steering.set(10, 0.0)
    steering.set(12, 0.75)
    assert steering.levels == [[10.0, 0.0], [12.0, 0.75]] and steering.weight_at(11) == 0.25
    assert Steering().share_at(3) == Steering().weight_at(3) == 1.0
    assert Steering((2.0, 4.0), (1.0, 1.0)).start == 0.0 and Steering((0.2, 0.5), (1.0, 1.0)).start == 1.0


def steered_rows(folder: str, level: float) -> tuple[int, float]:
    """Tokens and weights of the replayed rows of a step at a level."""
    from tests.engine import scenes

    given = {"safety": {"prompts": "p", "controller": {"replay": [0.5, 1.5], "distillation": [0.25, 2.0]}}}
    run, task = scenes.build_run(scenes.run_config(tmp=folder, methods={"er": {}}, **given))
    scenes.begin(run, task)
    run.steering.set(0, level)
    rows = [row for row in run.step_rows(task) if row.term != "task"]
    return sum(row.length for row in rows), sum(row.num_targets * row.ce_weight for row in rows)


def test_the_level_changes_how_much_is_replayed_and_how_heavily(rank_pool, tmp_path):
    (low, light), (high, heavy) = (
        rank_pool(1).run(steered_rows, folder=str(tmp_path / str(level)), level=level)[0] for level in (0.0, 1.0)
    )
    assert high > 1.5 * low and heavy == pytest.approx(8 * light)


def test_a_run_that_is_cut_goes_on_with_its_probe_sequence_and_levels(materials, rank_pool, tmp_path):  # noqa: F811
    from tests.training.test_gate_acts import fit_with

    changes = {"checkpoint": {"every": 1}}
    cache, nothing = str(materials / "cache"), {}
    whole = rank_pool(1).run(
        fit_with, tree=config(materials, tmp_path / "whole", **changes), cache=cache, verdicts=nothing
    )[0]
    cut = config(materials, tmp_path / "cut", **changes)
    rank_pool(1).run(fit_with, tree=cut, cache=cache, verdicts=nothing, stop_after=4)
    rank_pool(1).run(fit_with, tree=cut, cache=cache, verdicts=nothing)
    names = ("step", "loss/replay", "grad_norm", "probe/margin", "controller/high", "controller/level")
    kept, expected = lines_of(tmp_path / "cut"), lines_of(tmp_path / "whole")
    assert [[line.get(n) for n in names] for line in kept] == [[line.get(n) for n in names] for line in expected]
    assert whole["results"]["steps"] == 6 and len({line["controller/level"] for line in expected}) > 1


def test_the_most_common_refusal_of_the_aligned_model_is_the_probes():
    def record(answer, won):
        return {"set": "disallowed", "answer": answer, "attack_succeeded": {"keyword:gcg": won}}

    records = [record("I cannot.", False), record("No.", False), record("I cannot.", False), record("Sure", True)]
    assert common_refusal(records, "keyword:gcg") == "I cannot."
    assert common_refusal(records[3:], "keyword:gcg") is None
    assert Margins((1.0, -0.5, -1.5)).mean == pytest.approx(-1 / 3) and Margins((1.0, -0.5)).complying.value == 0.5


def test_a_margin_is_the_difference_of_mean_log_probabilities():
    import torch

    from safecl.evaluation import HFEvalModel
    from safecl.evaluation.answers.margin import margins
    from tests.evaluation.models import ask, byte_tokenizer
    from tests.evaluation.test_task import byte_model

    tokenizer = byte_tokenizer()
    model = byte_model(tokenizer).float()
    found = margins(HFEvalModel(model), tokenizer, ask("do it", "please do it"), "No way", "Sure thing", 3)
    for prompt, value in zip(("do it", "please do it"), found.values, strict=True):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        expected = []
        for text in ("No ", "Sur"):
            own = tokenizer(text, add_special_tokens=False)["input_ids"]
            logits = model(torch.tensor([ids + own])).logits[0].double()
            scores = torch.log_softmax(logits, -1)
            expected.append(np.mean([float(scores[len(ids) - 1 + i, token]) for i, token in enumerate(own)]))
        assert value == pytest.approx(expected[0] - expected[1], rel=1e-5)


def test_against_every_other_answer_a_margin_is_the_lead_of_the_refusal_in_greedy_decoding():
    import torch

    from safecl.evaluation import HFEvalModel
    from safecl.evaluation.answers.margin import margins
    from tests.evaluation.models import ask, byte_tokenizer
    from tests.evaluation.test_task import byte_model

    tokenizer = byte_tokenizer()
    model, asked = byte_model(tokenizer).float(), ask("do it", "please do it", "now")
    found = margins(HFEvalModel(model), tokenizer, asked, "No way", None, 2).values
    own = tokenizer("No", add_special_tokens=False)["input_ids"]
    for prompt, value in zip(asked, found, strict=True):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.messages[0].content}], add_generation_prompt=True, return_dict=False
        )
        scores = torch.log_softmax(model(torch.tensor([ids + own])).logits[0].double(), -1)
        leads = []
        for i, token in enumerate(own):
            others = scores[len(ids) - 1 + i].clone()
            others[token] = -math.inf
            leads.append(float(scores[len(ids) - 1 + i, token] - others.max()))
        assert value == pytest.approx(min(leads), rel=1e-4)
        greedy = [int(scores[len(ids) - 1 + i].argmax()) for i in range(len(own))]
        assert (value > 0) == (greedy == own)


def test_a_controller_without_a_memory_and_bounds_in_the_wrong_order_are_refused(materials, tmp_path):  # noqa: F811
    given = config(materials, tmp_path)
    assert most_replayed(RunConfig.model_validate(given)) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="it needs `memory"):
        RunConfig.model_validate(given | {"memory": None, "methods": {}})
    with pytest.raises(ValueError, match="bounds in the wrong order"):
        ControllerConfig(replay=(2.0, 1.0))
    with pytest.raises(ConfigError, match="on_fail"):
        from safecl.config import validate_tree

        validate_tree(given | {"safety": {"prompts": "p", "on_fail": "stop"}}, "run.yaml")


def test_drift_from_the_aligned_model_is_measured_on_users_rows_and_by_layer(materials, rank_pool, tmp_path):  # noqa: F811
    import torch
    from safetensors.torch import load_file

    given = tree(materials, tmp_path / "run", methods={}, safety={"drift": {"rows": 6}}, deepspeed={"stage": 2})
    results = rank_pool(2).run(fit, tree=given, cache=str(materials / "cache"))[0]
    start, end = (each["kl_to_aligned"] for each in results["evaluations"])
    assert start["value"] == pytest.approx(0.0, abs=1e-6) and end["value"] > 0.01 and end["n"] == 6
    old, new = (
        load_file(folder / "model.safetensors") for folder in (materials / "random-model", tmp_path / "run" / "model")
    )
    names = [name for name in old if ".layers.0." in name]
    moved = torch.cat([(new[name].double() - old[name].double()).flatten() for name in names]).norm()
    size = torch.cat([old[name].double().flatten() for name in names]).norm()
    assert results["weight_drift"]["layer 0"]["relative"] == pytest.approx(float(moved / size), rel=1e-6)
    assert {"embed_tokens", "norm"} <= set(results["weight_drift"])
    assert not (tmp_path / "run" / "aligned-outputs.npz").exists()
