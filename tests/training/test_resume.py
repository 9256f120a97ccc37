"""A run that was stopped resumes as if it had not been: bitwise in the same layout, and with the same rows in any
other."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from safecl.config.method_registry import builtin_methods, method_module
from safecl.engine.checkpoint.format import MANIFEST, dump_manifest, read_contents, read_manifest
from tests.engine.passes import oracle
from tests.training import resume_scenes

EWC = {"ewc": {"strength": 0.5, "sign_batches": 4, "rows_per_batch": 4}}
EMA = {"ema": {"decay": 0.9}}

# As many methods in one run as can be, so that each is cut at ten points in few runs.
SETS = {
    "der, er, ewc, ema": dict(
        methods={"der": {"alpha": 0.5}, "er": {}, **EWC, **EMA}, memory={"draw": "mix_cd"}, deepspeed={"stage": 2}
    ),
    "derpp, lwf, l2_sp, slow ema": dict(
        methods={"derpp": {}, "lwf": {}, "l2_sp": {}, "ema": {"decay": 0.5, "write_back": "slow", "every": 3}},
        deepspeed={"stage": 3},
    ),
    "agem, online_ewc, ema to the anchor, in bf16 with offload": dict(
        methods={"agem": {}, "online_ewc": {}, "ema": {"decay": 0.05, "write_back": "anchor", "every": 3}},
        memory={"draw": "loss_aware"},
        model={"dtype": "bf16"},
        bf16=True,
        deepspeed={"stage": 1, "offload": {"optimizer": "cpu"}},
    ),
}
for _name in builtin_methods():
    _settings = method_module(_name).Config()
    if _settings.acts_on == "align" or _settings.needs_lora or _settings.scoring_models or _settings.needs_answers:
        continue  # they need rows or models that are not here; tests/methods/test_every_method.py cuts them
    if not any(_name in changes["methods"] for changes in SETS.values()):
        SETS[_name] = dict(methods={_name: {}}, deepspeed={"stage": 2})


@pytest.fixture
def folder(tmp_path) -> str:
    return str(tmp_path / "run")


# Every set has a part of its own to bring back; the first holds most kinds of state.
@pytest.mark.parametrize(
    "name", [name if not i else pytest.param(name, marks=pytest.mark.long) for i, name in enumerate(SETS)]
)
def test_a_run_cut_at_any_of_ten_steps_ends_bitwise_like_the_uninterrupted_one(rank_pool, folder, name):
    """Weights, live weights, moments, EMA, Fisher, anchor, generators, memory, rows of every step, losses, norms."""
    for differences in rank_pool(2).run(
        resume_scenes.cut_at_every_step, folder=folder, steps=11, cuts=10, **SETS[name]
    ):
        assert not differences, differences[:10]


@pytest.mark.parametrize("kind", ["weights", "exp_avg", "exp_avg_sq", "ema", "fisher", "anchor"])
def test_the_comparison_bites_where_one_kind_of_state_does_not_come_back(rank_pool, folder, kind):
    changes = dict(methods=EWC | EMA | {"er": {}}, deepspeed={"stage": 2})
    differences = rank_pool(2).run(resume_scenes.cut_with_a_loss, folder=folder, lost=kind, **changes)[0]
    assert any(kind in difference for difference in differences)
    assert kind == "ema" or any("weights at step 2" in difference for difference in differences)


@pytest.mark.parametrize("bf16", [False, True])
def test_an_anchor_that_is_the_base_model_is_named_and_not_stored_and_another_base_model_is_refused(
    rank_pool, folder, bf16
):
    changes = dict(
        methods={"l2_sp": {}} | EMA, deepspeed={"stage": 2}, bf16=bf16, model={"dtype": "bf16" if bf16 else "fp32"}
    )
    rank_pool(2).run(resume_scenes.train_and_save, folder=folder, steps=2, save_after=[2], **changes)
    contents = read_contents(Path(folder) / "checkpoints" / "step-00000002")
    (reference,) = contents.manifest.references.items()
    assert (
        reference[0] == "anchor"
        and reference[1].model == "unused"
        and reference[1].dtype == ("BF16" if bf16 else "F32")
    )
    assert "anchor" not in contents.manifest.kinds and not any(kind == "anchor" for kind, _ in contents.slices)
    for message in rank_pool(2).run(resume_scenes.refusal_of_resuming, folder=folder, other_base=True, **changes):
        assert (
            "its anchor is the model unused as it was when the run began, and model.path now holds other weights"
            in message
        )


def test_a_checkpoint_of_another_version_is_refused_and_neither_set_aside_nor_passed_over(rank_pool, folder):
    """An older safecl must not take what a newer one has saved for damaged, and delete it at the next save."""
    changes = dict(methods={}, deepspeed={"stage": 1})
    rank_pool(2).run(resume_scenes.train_and_save, folder=folder, steps=2, save_after=[1, 2], **changes)
    newest = Path(folder) / "checkpoints" / "step-00000002"
    manifest = dataclasses.replace(read_manifest(newest), version=3)
    (newest / MANIFEST).write_bytes(dump_manifest(manifest))
    for message in rank_pool(2).run(resume_scenes.refusal_of_resuming, folder=folder, **changes):
        assert "safecl-checkpoint version 3, this safecl reads safecl-checkpoint versions 1 and 2" in message
        assert "resume with the safecl that wrote it" in message
    assert newest.is_dir() and not list(newest.parent.glob("damaged-*"))


def test_an_anchor_taken_after_training_is_stored(rank_pool, folder):
    changes = dict(methods={"online_ewc": {"sign_batches": 2, "rows_per_batch": 4}}, deepspeed={"stage": 1})
    rank_pool(2).run(resume_scenes.train_after_a_first_task, folder=folder, **changes)
    manifest = read_manifest(Path(folder) / "checkpoints" / "step-00000003")
    assert manifest.kinds["online_anchor"] == "F32" and not manifest.references


def layout(stage: int, optimizer: str = "none", parameters: str = "none") -> dict:
    return {"stage": stage, "offload": {"optimizer": optimizer, "parameters": parameters}}


# 1, 2 and 4 ranks, every stage, offload on and off, each saving for the next
LEGS = [
    (1, layout(0)), (2, layout(3)), (4, layout(2, "cpu")), (1, layout(3, "cpu", "cpu")), (2, layout(1)),
    (4, layout(0)), (2, layout(2, "cpu")), (1, layout(1, "cpu")), (4, layout(3, "cpu", "cpu")), (1, layout(2)),
]  # fmt: skip


@pytest.mark.long
def test_a_run_that_changes_ranks_stage_and_offload_ten_times_sees_the_same_rows_and_ends_at_the_same_weights(
    rank_pool, folder, tmp_path
):
    """Bitwise the same state right after each loading; after 20 steps within 1e-3 of the run that never changed."""
    online = {"online_ewc": {"sign_batches": 4, "rows_per_batch": 4}}
    settings = dict(
        methods=EWC | online | EMA | {"der": {"alpha": 0.5}}, begins_again_at=3
    )  # from then on one anchor is stored
    saved = None
    for number, (world_size, deepspeed) in enumerate(LEGS, start=1):
        start, end, log = rank_pool(world_size).run(
            resume_scenes.leg, folder=folder, until=2 * number, deepspeed=deepspeed, **settings
        )[0]
        if saved is None:
            first = start
        else:
            assert {kind: list(values) for kind, values in saved.items()} == {
                kind: list(values) for kind, values in start.items()
            }
            for kind, values in saved.items():
                assert all(torch.equal(values[name], start[kind][name]) for name in values), (number, kind)
                assert all(values[name].dtype == start[kind][name].dtype for name in values), (number, kind)
        saved = end
    whole = rank_pool(1).run(
        resume_scenes.leg, folder=str(tmp_path / "whole"), until=20, deepspeed=layout(1), **settings
    )[0]
    assert [line["rows"] for line in log] == [line["rows"] for line in whole[2]]
    for kind in ("weights", "ema"):
        assert oracle.relative_distance(end[kind], whole[1][kind], first["weights"]) <= 1e-3
    others = {"exp_avg", "exp_avg_sq", "fisher", "anchor", "online_fisher", "online_anchor"}
    assert end.keys() == whole[1].keys() == others | {"weights", "ema"}
    for kind in others:
        assert oracle.relative_distance(end[kind], whole[1][kind]) <= 1e-3
