"""Merging back at a task's end: by shards in every stage, chosen by a gate, and refused where it cannot work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from safecl.config import ConfigError, RunConfig, load_config, validate_tree
from safecl.planning.merge_checks import check_merges, usable_kinds
from tests.methods import every_method
from tests.methods.test_every_method import LAYOUTS, distance
from tests.training.test_trainer import materials, tree  # noqa: F401 - a fixture

ALPHA = 0.3


def weights(folder: str, methods: dict, **changes) -> dict:
    """The weights before and after a task of a few steps, by name; the average where the run saves it."""
    from tests.training import resume_scenes

    config = every_method.config_of(None, folder, methods=methods, **changes)
    with every_method.opened(config, folder) as (run, task, saver):
        every_method.begin(run, task, saver)
        start = resume_scenes.whole_state(run)["weights"]
        every_method.go_on(run, task, saver)
        state = resume_scenes.whole_state(run)
        return {"start": start, **state}


def trial(folder: str, **changes) -> dict:
    """What two points leave in the weights, and what is left after `restore`."""
    from safecl.training.end_merge import EndMerge, merges_of
    from tests.training import resume_scenes

    methods = {"merge_back": {"pick": "gate"}}
    config = every_method.config_of(None, folder, methods=methods, **changes)
    with every_method.opened(config, folder) as (run, task, saver):
        every_method.begin(run, task, saver)
        every_method.go_on(run, task, saver)
        found = [resume_scenes.whole_state(run)["weights"]]
        work = EndMerge(run, *merges_of(run), keep=True)
        for alpha in (0.0, ALPHA):
            work.apply({"alpha": alpha})
            found.append(resume_scenes.whole_state(run)["weights"])
        work.restore()
        found.append(resume_scenes.whole_state(run)["weights"])
        return dict(zip(("tuned", "none", "some", "restored"), found, strict=True))


@pytest.mark.parametrize("layout", ["stage 1", "stage 2, offload", "stage 3"])
def test_the_merge_is_that_of_the_aligned_and_the_trained_weights(rank_pool, tmp_path, layout):
    merge = {"merge_back": {"settings": {"alpha": ALPHA}}}
    found = rank_pool(2).run(weights, folder=str(tmp_path / "a"), methods=merge, **LAYOUTS[layout])[0]
    plain = rank_pool(2).run(weights, folder=str(tmp_path / "b"), methods={}, **LAYOUTS[layout])[0]
    assert found["start"].keys() == plain["weights"].keys()
    expected = {n: a.double() + ALPHA * (plain["weights"][n].double() - a.double()) for n, a in found["start"].items()}
    assert distance(found["weights"], expected, found["start"]) < 1e-5


def test_the_average_is_merged_where_the_run_saves_it_and_by_depth_where_the_kind_says_so(rank_pool, tmp_path):
    merge = {"merge_back": {"kind": "lines", "settings": {"alpha": ALPHA}}}
    ema = {"ema": {"decay": 0.5}}
    found = rank_pool(2).run(weights, folder=str(tmp_path / "a"), methods=merge | ema, **LAYOUTS["stage 2, offload"])[0]
    plain = rank_pool(2).run(weights, folder=str(tmp_path / "b"), methods=ema, **LAYOUTS["stage 2, offload"])[0]
    blocks = [int(part) for name in plain["ema"] for part in name.split(".") if part.isdigit()]
    for name, average in plain["ema"].items():
        block = next((int(part) for part in name.split(".") if part.isdigit()), None)
        factor = ALPHA + (0 if block is None else (1 - ALPHA) * block / max(1, max(blocks)))
        start = found["start"][name].double()
        assert torch.allclose(found["ema"][name].double(), start + factor * (average.double() - start), atol=1e-6), name
    assert all(found["weights"][name].equal(value) for name, value in plain["weights"].items()), "the live ones stay"


def test_points_start_from_the_trained_weights_and_leave_no_trace(rank_pool, tmp_path):
    found = rank_pool(2).run(trial, folder=str(tmp_path), **LAYOUTS["stage 3"])[0]
    assert all(found["restored"][name].equal(value) for name, value in found["tuned"].items())
    for name, tuned in found["tuned"].items():
        aligned = found["none"][name].double()
        assert torch.allclose(found["some"][name].double(), aligned + ALPHA * (tuned.double() - aligned), atol=1e-6)
    assert distance(found["none"], found["tuned"]) > 1e-4


# ----------------------------------------------------------------------------------------------------- chosen by a gate


def fit(config: dict, cache: str, highest: float = 1.0) -> dict:
    """Train with a gate that passes points up to `highest`."""
    import os

    os.environ["SAFECL_CACHE"] = cache
    from safecl.evaluation import GateResult
    from safecl.training.guard.measuring import Measurements
    from safecl.training.trainer import Trainer

    def judge(measured, found):
        return GateResult(
            "failed" if "=" in found.when and float(found.when.split("=")[-1]) > highest else "passed", ()
        )

    Measurements.judge = judge
    return Trainer(RunConfig.model_validate(config)).fit().results


def run_tree(materials: Path, output: Path, **methods) -> dict:  # noqa: F811
    config = tree(materials, output, safety={"gate": {"max_asr": 0.99}})
    config["tasks"][0]["eval"]["metric"] = "answer_nll"
    config["methods"] = methods
    return config


def test_a_run_keeps_the_point_with_the_highest_utility_of_those_that_pass(rank_pool, materials, tmp_path):  # noqa: F811
    cache = str(materials / "cache")
    configs = {
        "plain": run_tree(materials, tmp_path / "plain"),
        "merged": run_tree(materials, tmp_path / "merged", merge_back={"pick": "gate", "sweep": "alpha=0.2,0.6,1"}),
    }
    results = {name: rank_pool(2).run(fit, config=c, cache=cache, highest=0.6)[0] for name, c in configs.items()}
    (file,) = (tmp_path / "merged" / "outputs").glob("*-merge-back-sentiment.json")
    written = json.loads(file.read_text())
    values = [point["tasks"]["sentiment"]["value"] for point in written["points"]]
    assert values[0] > values[1] > values[2], "more of the task is a lower loss"
    assert written["picked"] == 1 and [p["gate"]["verdict"] for p in written["points"]] == [
        "passed",
        "passed",
        "failed",
    ]
    assert results["merged"]["evaluations"][-1]["tasks"]["sentiment"]["value"] == pytest.approx(values[1])
    assert results["plain"]["evaluations"][-1]["tasks"]["sentiment"]["value"] == pytest.approx(values[2], rel=1e-5)
    base, plain, merged = (
        load_file(folder / "model.safetensors")
        for folder in (materials / "random-model", tmp_path / "plain" / "model", tmp_path / "merged" / "model")
    )
    expected = {name: base[name] + 0.6 * (plain[name] - base[name]) for name in base}
    assert distance(merged, expected, base) < 1e-4


# --------------------------------------------------------------------------------------------------------------- config


def config(methods: dict, **changes) -> RunConfig:
    task = {"name": "a", "train": "t.jsonl", "eval": {"path": "e.jsonl"}}
    safety = {"prompts": "p.jsonl", "gate": {"max_asr": 0.1}}
    base = {"model": {"path": "m"}, "tasks": [task], "safety": safety, "output": "runs/a", "methods": methods}
    return validate_tree(base | changes, "run.yaml")


def test_the_kinds_that_work_in_a_run_have_a_usual_sweep():
    assert usable_kinds() == ["lines", "task_arithmetic", "wise_ft"]
    for kind in usable_kinds():
        check_merges(config({"merge_back": {"kind": kind, "pick": "gate"}}))


WRONG = {
    "methods.merge_back.kind: safe_lora needs more than the aligned and the tuned weights": {"kind": "safe_lora"},
    "no merge is called `wise-ft`; did you mean `wise_ft`?": {"kind": "wise-ft"},
    "methods.merge_back: wise_ft: unknown key `aplha`; did you mean `alpha`?": {"settings": {"aplha": 1}},
    "wise_ft: unknown key `scale`": {"pick": "gate", "sweep": "scale=0:1:0.5"},
    "--sweep alpha=0:1: a range is first:last:step": {"pick": "gate", "sweep": "alpha=0:1"},
}


@pytest.mark.parametrize("message", list(WRONG))
def test_a_merge_that_cannot_work_is_named_before_anything_is_loaded(message):
    with pytest.raises(ConfigError) as error:
        check_merges(config({"merge_back": WRONG[message]}))
    assert message in str(error.value)


def test_a_choice_needs_a_gate_and_a_task_to_measure_and_no_lora():
    merge = {"merge_back": {"pick": "gate"}}
    with pytest.raises(ConfigError, match=r"methods\.merge_back\.pick: needs safety\.gate"):
        check_merges(config(merge, safety={"prompts": "p.jsonl"}))
    with pytest.raises(ConfigError, match=r"methods\.merge_back\.pick: needs a task with `eval`"):
        check_merges(config(merge, tasks=[{"name": "a", "train": "t.jsonl"}]))
    with pytest.raises(ConfigError, match="sweep needs pick: gate"):
        config({"merge_back": {"sweep": "alpha=0:1:0.1"}})
    with pytest.raises(ConfigError, match=r"merge_back with model.lora: .*lora_scale --sweep factor"):
        config(merge, model={"path": "m", "lora": {}})


def test_check_refuses_what_train_refuses(materials, tmp_path):  # noqa: F811
    import yaml

    from safecl.planning.run_plan import plan_run

    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_tree(materials, tmp_path / "run", merge_back={"kind": "ties"})))
    with pytest.raises(ConfigError, match=r"merge_back.kind: ties needs more than .*lines, task_arithmetic, wise_ft"):
        plan_run(load_config(path))
