"""Values that are NaN or infinite, from anywhere: nothing is changed, nothing is saved, nothing is handed over, and the
message says what it is."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from safecl.config import ConfigError, RunConfig
from tests.faults import nonfinite_scenes as scenes
from tests.training.test_trainer import materials, tree  # noqa: F401  # materials is a fixture

DERPP = {"derpp": {"alpha": 0.5, "beta": 0.5}}
PLAIN = ("memory", "methods", "safety")
STATE = {
    "weights": "the weights hold",
    "exp_avg": "AdamW's first moments hold",
    "exp_avg_sq": "AdamW's second moments hold",
    "ema": "the average of the weights (ema) holds",
    "fisher": "the state fisher holds",
    "anchor": "the state anchor holds",
}


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_state_that_is_not_finite_is_counted_named_and_never_saved(rank_pool, tmp_path, stage, value):
    ranks = rank_pool(2).run(
        scenes.steps_on_poisoned_state, kinds=list(STATE), value=value, stage=stage, tmp=str(tmp_path)
    )
    for kind, said in STATE.items():
        clean, counted, applied, described, later, checkpoints = ranks[0][kind]
        assert clean == 0
        assert described.startswith(
            f"{said} one value that is not finite (NaN or infinite), the first in {scenes.PLACE}"
        )
        if kind != "anchor":  # a checkpoint names the base model in its place
            assert checkpoints == ["step-00000001"], f"{kind}: the checkpoint from before is the only one"
        if kind != "weights":  # their loss is not finite either, and the step is skipped
            assert applied and counted > 0, kind
        assert later is not None, kind


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize(
    "of, term", [("task", "task"), ("memory", "replay2"), ("teacher", "replay, distance to the teacher")]
)
def test_a_skipped_step_changes_nothing_and_names_term_rank_and_row(rank_pool, stage, of, term):
    memory = {"source": "unused", "replay_ratio": 1.0, "teacher": {"k": 8}, "draw": "mix_cd"}
    ranks = rank_pool(2).run(
        scenes.step_with_a_bad_row, stage=stage, of=of, memory=memory, methods=DERPP | {"ema": {"decay": 0.9}}
    )
    for found in ranks:
        assert not found["applied"] and found["changed"] == []
        assert found["cause"].startswith(f"the loss {term} is not finite on rank 1, in "), found["cause"]
        assert "rank 0" not in found["cause"]
    if of == "task":
        assert any(f"test.jsonl:{line}" in ranks[0]["cause"] for line in ranks[0]["lines"])
    else:
        assert "row " in ranks[0]["cause"] or "test.jsonl:" in ranks[0]["cause"]


def test_a_gradient_that_one_replica_alone_sees_as_not_finite_is_skipped_by_all(rank_pool):
    for applied, cause, equal in rank_pool(2).run(scenes.step_with_one_bad_replica, stage=0):
        assert not applied and equal
        assert "the gradient only on some ranks, not on rank 1" in cause


def plain(materials, output, stage: int = 2, steps: int = 4, **train) -> dict:  # noqa: F811
    config = tree(materials, output, train={"max_steps": steps} | train, deepspeed={"stage": stage})
    for section in PLAIN:
        del config[section]
    return config


def test_a_learning_rate_that_ruins_the_weights_fails_in_that_step_and_saves_nothing(rank_pool, materials, tmp_path):  # noqa: F811
    config = plain(materials, tmp_path / "run", learning_rate=1e38, warmup_ratio=0.0)
    message = rank_pool(2).run(scenes.fit, tree=config, cache=str(materials / "cache"))[0]
    assert message.startswith("TrainingFailed: step 0: ") and "not finite (NaN or infinite), the first in " in message
    assert "there is no earlier checkpoint" in message
    assert not list((tmp_path / "run").glob("model*")) and not (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("fault", ["weights at the end", "ema at the end", "live weights at the end"])
def test_a_model_that_is_not_finite_is_never_handed_over(rank_pool, materials, tmp_path, fault, stage):  # noqa: F811
    config = plain(materials, tmp_path / "run", stage=stage, steps=2)
    config["methods"] = {"ema": {"decay": 0.5}} if fault.startswith("ema") else {}
    message = rank_pool(2).run(scenes.fit, tree=config, cache=str(materials / "cache"), fault=fault)[0]
    if fault.startswith("live"):
        assert message.startswith("TrainingFailed: the model could not be saved: ")
        assert "are not finite (NaN or infinite)" in message
        assert message.endswith("what the update of step 1 wrote was finite")
    else:
        assert message.startswith("TrainingFailed: step 1: the ") and "known since after the last update" in message
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "results.json").exists()
    assert not list((tmp_path / "run").glob(".model*"))


def test_a_base_model_that_is_not_finite_is_refused_alike_by_check_train_and_eval(rank_pool, materials, tmp_path):  # noqa: F811
    from safecl.evaluation.answers.model import HFEvalModel
    from safecl.planning.model_checks import check_weights_are_finite

    shutil.copytree(materials / "random-model", tmp_path / "model")
    scenes.spoil_a_model(tmp_path / "model")
    config = plain(materials, tmp_path / "run")
    config["model"] = {**config["model"], "path": str(tmp_path / "model")}
    config["artifacts"] = {"folder": str(tmp_path / "artifacts")}
    words = "2 of the 128 values of model.norm.weight are not finite (NaN or infinite); such a model cannot be trained"
    trained = rank_pool(2).run(scenes.fit, tree=config, cache=str(materials / "cache"))[0]
    with pytest.raises(ConfigError) as checked:
        check_weights_are_finite(RunConfig.model_validate(config))
    assert trained.partition(": ")[2] == str(checked.value) and words in trained
    with pytest.raises(ConfigError, match=r"values of model\.norm\.weight are not finite"):
        HFEvalModel.load(tmp_path / "model")
    assert Path(tmp_path / "run").exists() and not (tmp_path / "run" / "model").exists()
