"""The memory of a run is computed from the model and the config, and the documentation's tables are printed by that
code."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from safecl.config import CheckpointConfig, GateConfig, LoraConfig, SafetyConfig
from safecl.config.method_registry import builtin_methods, method_module
from safecl.planning.costs import memory_tables
from safecl.planning.costs.device_memory import plan_memory
from safecl.planning.costs.memory_tables import shape_of_size
from safecl.planning.costs.model_shape import ModelShape
from safecl.planning.costs.planned_model import PlannedModel
from safecl.planning.passes import Passes
from tests.engine import scenes
from tests.methods.every_method import REQUIRED

PAGE = Path(__file__).parents[2] / "docs" / "memory.md"
SHAPE = ModelShape(weights=1000, trained=1000, largest=60, largest_layer=100, hidden=10, vocab=50, activations=5000)
METHODS = {"ewc": {}, "ema": {}}


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    from safecl.demo.materials import write_materials

    folder = tmp_path_factory.mktemp("demo")
    write_materials(folder)
    return folder


def test_the_tables_of_the_page_are_printed_by_the_code():
    assert (
        re.search(r"<!-- plan -->\n(.*?)\n<!-- end -->", PAGE.read_text(encoding="utf-8"), re.S)[1]
        == memory_tables.markdown()
    )


def config_of(stage: int, methods=METHODS, dtype: str = "bf16", role: str = "task", **offload):
    return scenes.run_config(
        model={"path": "m", "dtype": dtype},
        tasks=[{"name": "t", "train": "unused", "role": role}],
        methods=methods,
        deepspeed={"stage": stage, "offload": offload},
    )


def state_of(stage: int, world_size: int = 4, **changes) -> dict[tuple[str, str], int]:
    """Bytes of the items that are there all the time, by name and place."""
    plan = plan_memory(SHAPE, config_of(stage, **changes), world_size)
    return {(item.what, item.where): item.nbytes for item in plan.items if item.moment == "always"}


def test_sharded_state_and_the_reference_are_what_the_arithmetic_says():
    found = state_of(3)
    assert found["weights", "device"] == 2 * 250 and found["master weights", "device"] == 4 * 250
    assert found["moments", "device"] == 8 * 250
    assert found["fisher", "device"] == 2 * 250 and found["ema", "device"] == 4 * 250
    assert found["reference weights", "host"] == 2 * 1000 and ("anchor", "device") not in found
    assert state_of(2)["weights", "device"] == 2 * 1000
    assert state_of(0)["master weights", "device"] == 4 * 1000


def test_what_is_offloaded_is_in_host_memory_and_passes_through_chunks():
    found = state_of(3, reference="none", fisher="cpu", ema="cpu")
    assert found["anchor", "device"] == 2 * 250 and ("reference weights", "host") not in found
    assert found["fisher", "host"] == 2 * 250 and found["ema", "host"] == 4 * 250
    assert found["chunks of offloaded state", "device"] == 2 * 250 * (2 + 4)
    offloaded = state_of(3, optimizer="cpu", parameters="cpu")
    assert {
        where for (what, where) in offloaded if what in ("weights", "master weights", "moments", "ema", "fisher")
    } == {"host"}


def test_plain_fine_tuning_keeps_no_reference():
    assert ("reference weights", "host") not in state_of(3, methods={})


def test_of_what_passes_by_only_the_fullest_moment_counts():
    """Stage 3 on 4 GPUs: the buckets' second copy is made when the activations are gone; in a step neither is there."""
    plan = plan_memory(SHAPE, config_of(3, methods={}), 4)
    bytes_in = {
        moment: sum(item.nbytes for item in plan.items if item.moment == moment)
        for moment in ("backward", "reduce", "step")
    }
    kept, copy = (
        250 * (2 + 4 + 4 + 8) + 4 * 1000,
        250 * 12,
    )  # weights, gradients, masters, moments, a bucket; the copy for the checkpoint
    assert sum(item.nbytes for item in plan.items if item.moment == "always") == kept + copy
    assert (
        bytes_in["reduce"] == 4 * 1000 + 2 * 1000 and bytes_in["backward"] > 5000 + 2 * 1000 and bytes_in["step"] == 0
    )
    assert plan.device == kept + bytes_in["backward"] and plan.host == 4 * copy
    assert plan.shared_host == 4 * (kept + bytes_in["backward"] + copy)


def test_a_copy_for_the_checkpoint_is_in_host_memory_where_checkpoints_are_saved():
    config = config_of(3).model_copy(update={"checkpoint": CheckpointConfig(every="never")})
    assert state_of(3)["copy for the checkpoint", "host"] == 250 * (
        12 + 2 + 4
    )  # master, moments, Fisher, EMA; the anchor is the base model
    assert plan_memory(SHAPE, config, 4).bytes_of("copy for the checkpoint") == 0
    rolls_back = SafetyConfig(prompts="p", gate=GateConfig(max_asr=0.1), on_fail="rollback")
    config = config.model_copy(update={"safety": rolls_back})
    assert plan_memory(SHAPE, config, 4).bytes_of("last state that passed") == 2 * 250 * 18  # kept, and being written


def test_in_fp32_the_weights_of_stages_0_and_3_are_the_masters():
    for stage in range(4):
        assert (("master weights", "device") in state_of(stage, dtype="fp32")) == (stage in (1, 2))


def test_the_table_of_methods_says_how_many_bytes_a_weight_each_takes():
    """The table of docs/methods.md against the plan, in bf16 and in fp32."""
    page = (PAGE.parent / "methods.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[`(\w+)`\]\S+ \|[^|]+\|[^|]+\|[^|]+\| ([^|;]+)[^|]*\|", page, re.M)
    assert {name for name, _ in rows} == set(builtin_methods())
    for name, said in rows:
        if method_module(name).Config().needs_lora is not None:  # its bytes are of adapted weights; tests/methods
            continue
        for number, dtype in enumerate(("bf16", "fp32")):
            role = method_module(name).Config().acts_on
            plain = plan_memory(SHAPE, config_of(3, {}, dtype, role), 1, device="cpu").items
            items = plan_memory(SHAPE, config_of(3, {name: REQUIRED.get(name, {})}, dtype, role), 1, device="cpu").items
            lasting = [item for item in items if item.moment == "always" and item not in plain]
            own = [item for item in lasting if item.what != "copy for the checkpoint"]
            anchors = [item.nbytes / 1000 for item in own if item.what == "reference weights"]
            expected = sum(int(count) for count in re.findall(r"\d+", said)) + (
                2 * (number + 1) if "Fisher" in said else 0
            )
            assert sum(item.nbytes for item in own) / 1000 - sum(anchors) == expected, (name, dtype)
            assert anchors == ([2 * (number + 1)] if "anchor" in said else []), (name, dtype)


def test_singular_vectors_are_those_of_the_smaller_of_two_subspaces():
    shape = ModelShape.of(PlannedModel.of(scenes.tiny_model()), config_of(3, {"osft": {"high": 0.75}}))
    square, narrow, wide = (32, 32), (16, 32), (45, 32)  # q and o; k and v; gate, up and down
    ranks = {square: 24, narrow: 12, wide: 24}
    count = sum(
        number * sum(side * min(ranks[size], side - ranks[size]) for side in size)
        for size, number in ((square, 2), (narrow, 2), (wide, 3))
    )
    assert shape.singular_vectors == 2 * 4 * count  # two layers, fp32
    assert plan_memory(shape, config_of(3, {"osft": {}}), 4).bytes_of("singular vectors") == shape.singular_vectors // 4


def test_gradients_of_hidden_states_are_one_state_per_token_and_layer_of_a_step():
    config, passes = config_of(3, {"vaccine": {}}, role="align"), Passes((2, 64), alignment_tokens=500)
    shape = ModelShape.of(PlannedModel.of(scenes.tiny_model()), config, passes)
    assert shape.moved_hidden == 2 * 500 * 32 * 2  # layers, tokens, hidden size, bytes
    assert plan_memory(shape, config, 4).bytes_of("gradients of hidden states") == shape.moved_hidden
    assert ModelShape.of(PlannedModel.of(scenes.tiny_model()), config_of(3, {}), passes).moved_hidden == 0


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_with_lora_the_adapters_are_counted_as_peft_makes_them(targets):
    from safecl.engine.model.adapters import add_adapters
    from safecl.engine.model.outline import Outline

    lora = LoraConfig(r=3, target_modules=targets)
    planned = ModelShape.without_activations(Outline.of(scenes.tiny_model()), lora).trained
    model = add_adapters(scenes.tiny_model(), scenes.run_config(model={"path": "m", "lora": lora.model_dump()}).model)
    assert planned == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_checkpoint_takes_the_state_or_the_staging_whichever_is_smaller():
    large = replace(SHAPE, weights=10**9, trained=10**9)
    for staging, wanted in (("2GiB", 2 * 2**30), ("64MiB", 64 * 2**20), ("1TB", 10**9 * 18)):
        config = config_of(3).model_copy(update={"checkpoint": CheckpointConfig(staging=staging)})
        assert plan_memory(large, config, 1).bytes_of("copy for the checkpoint") == wanted


@pytest.mark.parametrize(("size", "ranks"), [("7B", 1), ("13B", 8), ("70B", 8), ("70B", 64)])
def test_under_zero_3_loading_takes_a_ranks_part_and_one_whole_parameter(size, ranks):
    """The same as tests/engine/zero/test_sharded_start.py counts in a real start."""
    shape = shape_of_size(size, config_of(3))
    loading = plan_memory(shape, config_of(3), ranks).loading
    assert loading == (-(-shape.weights // ranks) + shape.largest) * 2
    assert plan_memory(shape, config_of(2), ranks).loading == 4 * shape.weights


def test_70b_fits_eight_gpus_of_80_gb_with_its_optimizer_in_host_memory():
    offload = {"optimizer": "cpu", "parameters": "cpu", "fisher": "cpu", "ema": "cpu"}
    config = config_of(3, **offload)
    shape = shape_of_size("70B", config)
    plan = plan_memory(shape, config, 8)
    assert max(plan.loading, plan.device) == plan.device < 80e9
    resident = config_of(3, **{**offload, "parameters": "none"})
    assert plan_memory(shape, resident, 8).device < 80e9


def test_7b_fits_one_gpu_of_139_gib_and_128_gib_of_host_memory_with_its_checkpoints():
    """In ZeRO-2 with the methods' state in host memory. Checkpoints through a copy of the whole state would not fit."""
    config = config_of(2, reference="cpu", fisher="cpu", ema="cpu")
    shape = shape_of_size("7B", config)
    plan = plan_memory(shape, config, 1)
    assert plan.device < 139 * 2**30 and plan.host < 128 * 2**30
    whole = config.model_copy(update={"checkpoint": CheckpointConfig(staging="1TB")})
    assert plan_memory(shape, whole, 1).host > 128 * 2**30
    assert plan_memory(shape, config_of(2), 1).device > 139 * 2**30, "with the state on the device"


@pytest.mark.parametrize(("stage", "bucket"), [(1, 2000), (2, 2000), (3, 4000)])
def test_overlapping_takes_a_second_bucket(stage, bucket):
    def backward(**options) -> int:
        config = config_of(stage)
        deepspeed = config.deepspeed.model_copy(update=options)
        plan = plan_memory(SHAPE, config.model_copy(update={"deepspeed": deepspeed}), 4)
        return sum(item.nbytes for item in plan.items if item.where == "device" and item.moment == "backward")

    assert backward(overlap_comm=True) - backward() == bucket


def test_a_fisher_estimate_takes_nothing_that_a_step_does_not():
    """Its fp32 sum exists before the moments, which are twice as large."""
    with_estimate, from_file = (
        plan_memory(SHAPE, config_of(3, methods={"ewc": settings}), 4) for settings in ({}, {"fisher": "fisher"})
    )
    assert with_estimate == from_file


def test_an_evaluation_is_a_moment_of_its_own():
    measured = replace(SHAPE, evaluation=10**9)
    plan = plan_memory(measured, config_of(3, methods={}), 4, program=7)
    assert ("evaluation", 10**9) in {(item.what, item.nbytes) for item in plan.at_peak("device")}
    assert not any(item.what == "activations" for item in plan.at_peak("device"))
    assert plan.bytes_of("program and libraries") == 7


def test_the_largest_passes_are_those_of_the_rows(materials, tmp_path):
    """A micro-batch is as full as a step's rows make it, with the replayed ones; an evaluation has its own batches."""
    from safecl.config import RunConfig
    from safecl.planning.passes import largest_passes
    from safecl.planning.run_plan import plan_run
    from tests.training.test_trainer import tree

    config = tree(materials, tmp_path / "run")
    plan = plan_run(RunConfig.model_validate(config))
    found, on_eight = (largest_passes(plan, ranks, vocab=1000) for ranks in (1, 8))
    rows, longest = found.micro_batch
    assert rows * longest <= 512 and longest <= max(plan.memory.lengths.max(), plan.tasks[0].dataset.lengths.max())
    assert on_eight.micro_batch[0] * on_eight.micro_batch[1] < rows * longest
    assert found.scored.tokens == plan.tasks[0].longest_evaluated > 0
    assert (found.generated.rows, found.generated.answer) == (32, 6)  # safety.batch_size and max_new_tokens
    del config["methods"]
    plain = largest_passes(plan_run(RunConfig.model_validate(config)), 1, vocab=1000)
    assert plain.micro_batch[1] < longest  # the memory has the longest rows
    config["safety"] = None
    assert largest_passes(plan_run(RunConfig.model_validate(config)), 1, vocab=1000).generated is None
