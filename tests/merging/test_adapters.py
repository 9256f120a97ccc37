"""LoRA adapters as dense weights, against peft, and adapters that are written again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import peft
import pytest
import torch
import transformers

from safecl.config import ConfigError
from safecl.merging import merge
from tests.merging import models

TARGETS = ["q_proj", "v_proj", "down_proj"]


def make_adapter(base: Path, folder: Path, seed: int = 0, targets=TARGETS, **settings) -> Path:
    """A peft adapter with random factors, saved by peft."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM", **settings)
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def merged_by_peft(folder: Path) -> dict[str, torch.Tensor]:
    """Whole weights as peft merges them, in fp32 (peft's own product is in fp32)."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    base = transformers.AutoModelForCausalLM.from_pretrained(settings["base_model_name_or_path"], dtype=torch.float32)
    whole = peft.PeftModel.from_pretrained(base, folder).merge_and_unload()
    return {name: value.double() for name, value in whole.state_dict().items()}


def in_files(family: str, state: dict[str, torch.Tensor], names) -> dict[str, torch.Tensor]:
    renamed = {"lm_head.weight": "embed_out.weight"} if family == "neox" else {}
    state = {renamed.get(name, name): value for name, value in state.items()}
    return {name: state[name] for name in names}


KINDS = {
    "plain": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "patterns": ("llama", {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 7}}),
    "embedding": ("llama", {"targets": ["embed_tokens", "q_proj"]}),
    "saved whole": ("llama", {"modules_to_save": ["lm_head"]}),
    "biases": ("qwen", {"bias": "lora_only"}),
    "all linear": ("gemma", {"targets": "all-linear"}),
    "head": ("llama", {"targets": ["lm_head", "up_proj"]}),
    "neox": ("neox", {"targets": ["query_key_value", "dense_4h_to_h"]}),
    "neox head": ("neox", {"targets": ["lm_head", "embed_out", "dense"]}),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_adapter_counts_as_the_weights_that_peft_makes_of_it(parents, kind, tmp_path):
    family, settings = KINDS[kind]
    adapter = make_adapter(parents(family)["base"], tmp_path / "adapter", **settings)
    merge("wise_ft", tuned=adapter, out=tmp_path / "out", alpha=1.0, dtype="fp32")
    found = models.exact(tmp_path / "out")
    expected = in_files(family, merged_by_peft(adapter), found)
    base = models.exact(parents(family)["base"])
    assert any(not torch.equal(found[name], base[name]) for name in found)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7, msg=name)


def test_two_adapters_are_merged_by_their_products_and_not_by_their_factors(parents, tmp_path):
    base = parents()["base"]
    first, second = (make_adapter(base, tmp_path / f"{i}", i) for i in (1, 2))
    merge("soup", tuned=[first, second], out=tmp_path / "out", dtype="fp32")
    a, b = merged_by_peft(first), merged_by_peft(second)
    for name, value in models.exact(tmp_path / "out").items():
        torch.testing.assert_close(value, (a[name] + b[name]) / 2, rtol=1e-6, atol=1e-7)


def test_an_adapter_and_a_whole_model_are_merged(parents, tmp_path):
    folders = parents()
    adapter = make_adapter(folders["base"], tmp_path / "adapter")
    merge(
        "task_arithmetic", base=folders["base"], tuned=[folders["tuned"], adapter], out=tmp_path / "out", dtype="fp32"
    )
    base, tuned, whole = models.exact(folders["base"]), models.exact(folders["tuned"]), merged_by_peft(adapter)
    for name, value in models.exact(tmp_path / "out").items():
        torch.testing.assert_close(value, tuned[name] + whole[name] - base[name], rtol=1e-6, atol=1e-6)


def test_a_discounted_adapter_is_written_again_and_peft_loads_it(parents, tmp_path):
    adapter = make_adapter(parents()["base"], tmp_path / "adapter")
    report = merge("lora_scale", tuned=adapter, out=tmp_path / "out", factor=0.25, adapter_rank=4)
    assert report.num_tensors == 2 * 3 * len(TARGETS)
    assert "leaves out 0.00%" in report.notes[-1]
    base, whole = models.exact(parents()["base"]), merged_by_peft(adapter)
    for name, value in merged_by_peft(tmp_path / "out").items():
        torch.testing.assert_close(value, 0.75 * base[name] + 0.25 * whole[name], rtol=1e-4, atol=1e-6)


def test_an_adapter_of_a_lower_rank_is_the_nearest_one_and_its_error_is_reported(parents, tmp_path):
    base = parents()["base"]
    adapters = [make_adapter(base, tmp_path / f"{i}", i) for i in (1, 2)]
    report = merge("task_arithmetic", tuned=adapters, out=tmp_path / "out", adapter_rank=3, dtype="fp32")
    start, first, second = models.exact(base), *map(merged_by_peft, adapters)
    found = merged_by_peft(tmp_path / "out")
    squares = missed = 0.0
    for name in start:
        change = first[name] + second[name] - 2 * start[name]
        if not bool(change.any()):
            continue
        singular = torch.linalg.svdvals(change)
        squares, missed = squares + float(singular.square().sum()), missed + float(singular[3:].square().sum())
        error = (found[name] - start[name] - change).norm()
        torch.testing.assert_close(error, singular[3:].norm(), rtol=1e-4, atol=1e-6)
    assert f"leaves out {math.sqrt(missed / squares):.2%}" in report.notes[-1]


def test_large_matrices_are_decomposed_by_random_directions_and_lose_nothing_that_has_the_rank():
    from safecl.merging.output import adapter

    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(1100, 5, generator=generator), torch.randn(5, 1030, generator=generator)
    before = torch.random.get_rng_state()
    left, right = adapter._factors(b @ a, 5, torch.float32)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.testing.assert_close(right @ left, b @ a, rtol=1e-4, atol=1e-3)


def test_adapters_that_cannot_hold_a_merge_are_refused(parents, tmp_path):
    folders = parents()
    adapter = make_adapter(folders["base"], tmp_path / "adapter")
    cases = {
        "adapter_rank needs a --base, and an adapter as the first": dict(tuned=[folders["tuned"], adapter]),
        "a LoRA adapter holds changes of linear layers only": dict(tuned=[adapter, folders["tuned"]]),
    }
    for message, given in cases.items():
        with pytest.raises(ConfigError, match=message):
            merge("task_arithmetic", base=folders["base"], out=tmp_path / "out", adapter_rank=4, **given)
    with pytest.raises(ConfigError, match="is no LoRA adapter; for whole models the same is wise_ft"):
        merge("lora_scale", base=folders["base"], tuned=folders["tuned"], out=tmp_path / "out")
    with pytest.raises(ConfigError, match="changes no weight of the base"):
        merge("lora_scale", tuned=adapter, out=tmp_path / "out", factor=0.0, adapter_rank=4)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def test_the_base_of_an_adapter_must_have_the_weights_of_the_given_base(parents, tmp_path):
    folders = parents()
    adapter = make_adapter(folders["base"], tmp_path / "adapter")
    same = models.copy(folders["base"], tmp_path / "copy")
    merge("wise_ft", base=same, tuned=adapter, out=tmp_path / "out")
    with pytest.raises(
        ConfigError, match=r"the adapter was trained on .*base, whose weights differ from those of base"
    ):
        merge("wise_ft", base=folders["tuned2"], tuned=adapter, out=tmp_path / "other")
