"""What a run takes of memory is worked out from the model and the config, and the documentation's tables are that code's output."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from safecl.config import LoraConfig
from safecl.engine import memory_plan
from safecl.engine.memory_plan import ModelShape, plan_memory
from tests.engine import scenes

PAGE = Path(__file__).parents[2] / "docs" / "memory.md"
SHAPE = ModelShape(weights=1000, trained=1000, largest_layer=100, num_layers=2, hidden=10, intermediate=20, vocab=50)
METHODS = {"ewc": {}, "ema": {}}


def test_the_tables_of_the_page_are_printed_by_the_code():
    assert re.search(r"<!-- plan -->\n(.*?)\n<!-- end -->", PAGE.read_text(encoding="utf-8"), re.S)[1] == memory_plan.markdown()


def state_of(stage: int, world_size: int = 4, methods=METHODS, **offload) -> dict[tuple[str, str], int]:
    config = scenes.run_config(
        model={"path": "m", "dtype": "bf16"}, methods=methods, deepspeed={"stage": stage, "offload": offload}
    )  # fmt: skip
    return {(item.what, item.where): item.nbytes for item in plan_memory(SHAPE, config, world_size).items}


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
    assert {where for (what, where) in offloaded if what in ("weights", "master weights", "moments", "ema", "fisher")} == {"host"}


def test_plain_fine_tuning_keeps_no_reference():
    assert ("reference weights", "host") not in state_of(3, methods={})


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_with_lora_the_adapters_are_counted_as_peft_makes_them(targets):
    from safecl.engine.model import add_adapters

    lora = LoraConfig(r=3, target_modules=targets)
    planned = ModelShape.of(scenes.tiny_model(), lora).trained
    model = add_adapters(scenes.tiny_model(), scenes.run_config(model={"path": "m", "lora": lora.model_dump()}).model)
    assert planned == sum(p.numel() for p in model.parameters() if p.requires_grad)
