"""The memory of a run is computed from the model and the config, and the documentation's tables are printed by that
code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from safecl.config import CheckpointConfig, LoraConfig
from safecl.config.method_registry import builtin_methods
from safecl.planning import memory_tables
from safecl.planning.device_memory import plan_memory
from safecl.planning.model_shape import ModelShape
from tests.engine import scenes

PAGE = Path(__file__).parents[2] / "docs" / "memory.md"
SHAPE = ModelShape(weights=1000, trained=1000, largest=60, largest_layer=100, hidden=10, vocab=50, activations=5000)
METHODS = {"ewc": {}, "ema": {}}


def test_the_tables_of_the_page_are_printed_by_the_code():
    assert (
        re.search(r"<!-- plan -->\n(.*?)\n<!-- end -->", PAGE.read_text(encoding="utf-8"), re.S)[1]
        == memory_tables.markdown()
    )


def config_of(stage: int, methods=METHODS, dtype: str = "bf16", **offload):
    return scenes.run_config(
        model={"path": "m", "dtype": dtype}, methods=methods, deepspeed={"stage": stage, "offload": offload}
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


def test_in_fp32_the_weights_of_stages_0_and_3_are_the_masters():
    for stage in range(4):
        assert (("master weights", "device") in state_of(stage, dtype="fp32")) == (stage in (1, 2))


def test_the_page_that_greets_says_of_every_method_how_many_bytes_a_weight_it_takes():
    """README's table against the plan, in bf16 and in fp32."""
    page = (PAGE.parents[1] / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", page, re.M)
    assert {name for name, _ in rows} == set(builtin_methods())
    for name, said in rows:
        for number, dtype in enumerate(("bf16", "fp32")):
            plain = plan_memory(SHAPE, config_of(3, methods={}, dtype=dtype), 1, device="cpu").items
            items = plan_memory(SHAPE, config_of(3, methods={name: {}}, dtype=dtype), 1, device="cpu").items
            own = [item for item in items if item not in plain and item.what != "copy for the checkpoint"]
            anchors = [item.nbytes / 1000 for item in own if item.what == "reference weights"]
            expected = sum(int(count) for count in re.findall(r"\d+", said)) + (
                2 * (number + 1) if "Fisher" in said else 0
            )
            assert sum(item.nbytes for item in own) / 1000 - sum(anchors) == expected, (name, dtype)
            assert anchors == ([2 * (number + 1)] if "anchor" in said else []), (name, dtype)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_with_lora_the_adapters_are_counted_as_peft_makes_them(targets):
    from safecl.engine.model.adapters import add_adapters

    lora = LoraConfig(r=3, target_modules=targets)
    planned = ModelShape.without_activations(scenes.tiny_model(), lora).trained
    model = add_adapters(scenes.tiny_model(), scenes.run_config(model={"path": "m", "lora": lora.model_dump()}).model)
    assert planned == sum(p.numel() for p in model.parameters() if p.requires_grad)
