"""Frozen weights stay bitwise, all others train as in plain PyTorch, and state and plan hold the trained ones alone."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from safecl.config import ConfigError, validate_tree
from safecl.methods.freezing.block_expansion import Config as Blocks
from safecl.methods.freezing.hft import Config as Half
from safecl.methods.freezing.safety_layers import Config as SafetyLayers
from tests.engine.passes import oracle
from tests.engine.scenes import random_dataset, run_config, tiny_model
from tests.methods import reference, scenes
from tests.methods.test_replay_methods import task_rows

STEPS = 4


def names() -> dict[str, int]:
    return {name: p.numel() for name, p in tiny_model().named_parameters()}


def start_of(methods: dict):
    """The model that a method starts from: with block expansion its second block is new, a copy of the first that adds
    nothing."""
    model = tiny_model()
    if "block_expansion" in methods:
        old, new = model.model.layers
        new.load_state_dict(old.state_dict())
        for last in (new.self_attn.o_proj, new.mlp.down_proj):
            torch.nn.init.zeros_(last.weight)
    return model


def train_frozen(**changes) -> dict:
    """All weights of the live model after some steps, and the number of elements of each kind of state on this rank."""
    config = run_config(memory=None, **changes)
    run, (task,) = scenes.make_run(config, start_of(config.methods), [random_dataset(60, seed=1)])
    run.begin_task(task, active=True)
    for _ in range(STEPS):
        run.train_step(task)
    shard = run.engine.shards
    live = {}
    for name, p in run.engine.module.model.named_parameters():
        with shard.full_parameter(p):
            live[name] = p.detach().clone()
    return {"live": live, "moments": sum(t.numel() for t in run.engine.optimizer.tensors("exp_avg"))}


@pytest.mark.parametrize(
    ("method", "settings", "stage"),
    [("hft", {}, 3), ("safety_layers", {"layers": [1]}, 2), ("block_expansion", {"blocks": [1]}, 3)],
)
def test_the_others_train_as_in_plain_pytorch_and_frozen_ones_stay(rank_pool, method, settings, stage):
    config = {"hft": Half, "safety_layers": SafetyLayers, "block_expansion": Blocks}[method](**settings)
    chosen = config.frozen(list(names()), reference.SEED)
    assert chosen
    ranks = rank_pool(2).run(train_frozen, methods={method: settings}, deepspeed={"stage": stage})
    student = start_of({method: settings})
    start = {name: p.detach().clone() for name, p in student.named_parameters()}
    for name, p in student.named_parameters():
        p.requires_grad_(name not in chosen)
    steps = task_rows(random_dataset(60, seed=1), STEPS)
    end = reference.train(student, [lambda rows=rows: reference.mean_nll(student, rows) for rows in steps])
    live = ranks[0]["live"]
    assert all(torch.equal(live[name], start[name]) for name in chosen)
    assert oracle.relative_distance({name: live[name] for name in end}, end, start) <= 1e-3
    trained = sum(size for name, size in names().items() if name not in chosen)
    assert trained <= sum(rank["moments"] for rank in ranks) <= trained + 64  # padding


def test_half_of_every_category_is_frozen_by_the_seed():
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    parts += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")
    known = [f"model.layers.{i}.{part}.weight" for i in range(8) for part in parts]
    known += [f"model.layers.{i}.self_attn.q_proj.bias" for i in range(8)]
    known += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    frozen = Half().frozen(known, seed=1)
    assert frozen == Half().frozen(known[::-1], seed=1) != Half().frozen(known, seed=2)
    for i in range(8):
        inside = {name for name in frozen if f".{i}." in name and name.endswith(".weight")}
        assert sum("self_attn" in name for name in inside) == 2 and sum("norm" in name for name in inside) == 1
        assert (f"model.layers.{i}.self_attn.q_proj.bias" in frozen) == (
            f"model.layers.{i}.self_attn.q_proj.weight" in frozen
        )
    assert sorted(sum(f".{i}.mlp" in name for name in frozen) for i in range(8)) == [1] * 4 + [2] * 4
    assert not {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} & frozen


def test_the_default_safety_layers_are_those_of_the_paper_at_the_same_depth():
    known = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(32)] + ["lm_head.weight"]
    assert {int(name.split(".")[2]) for name in SafetyLayers().frozen(known, 0)} == set(range(6, 13))
    adapters = [f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.default.weight" for i in range(4)]
    assert SafetyLayers(layers=[2]).frozen(adapters, 0) == {adapters[2]}
    with pytest.raises(
        ConfigError, match=r"methods.safety_layers.layers: there is no layer 40; the layers are 0 to 31"
    ):
        SafetyLayers(layers=[40]).check_weight_names("safety_layers", known)


def test_only_the_new_blocks_of_an_expanded_model_are_trained():
    known = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(10)] + ["lm_head.weight"]
    assert set(known) - Blocks(blocks=[3]).frozen(known, 0) == {known[3]}
    assert set(known) - Blocks().frozen(known, 0) == {known[4], known[9]}
    with pytest.raises(
        ConfigError, match=r"methods.block_expansion: the model has no fifth block; name the new blocks"
    ):
        Blocks().check_weight_names("block_expansion", known[:3])


@pytest.mark.parametrize("blocks", [1, 2])
def test_an_expanded_model_computes_what_it_did_before(tmp_path, blocks):
    from safecl.engine.model.expansion import expand_folder
    from tests.catalogue.models import save_model

    before = save_model(tmp_path / "before")
    added = expand_folder(str(before), tmp_path / "after", blocks)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    old = AutoModelForCausalLM.from_pretrained(before)
    assert added == {1: [2], 2: [1, 3]}[blocks] and model.config.num_hidden_layers == 2 + blocks
    weights = model.state_dict()
    assert all(weights[f"model.layers.{i}.self_attn.o_proj.weight"].count_nonzero() == 0 for i in added)
    assert torch.equal(
        weights[f"model.layers.{added[0]}.self_attn.q_proj.weight"],
        weights[f"model.layers.{added[0] - 1}.self_attn.q_proj.weight"],
    )
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, old(input_ids=ids).logits)


def test_blocks_that_cannot_be_spread_evenly_are_told(tmp_path):
    from safecl.engine.model.expansion import expand_folder
    from tests.catalogue.models import save_model

    before = save_model(tmp_path / "before")
    with pytest.raises(ConfigError, match="3 new blocks cannot be spread evenly over 2; possible: 1, 2"):
        expand_folder(str(before), tmp_path / "after", 3)
    with pytest.raises(ConfigError, match="exists already"):
        expand_folder(str(before), before, 1)


def test_the_plan_counts_trained_weights_alone():
    from safecl.planning.costs.model_shape import ModelShape
    from safecl.planning.costs.planned_model import PlannedModel

    sizes, config = names(), run_config(methods={"safety_layers": {"layers": [0]}})
    shape = ModelShape.of(PlannedModel.of(tiny_model()), config)
    frozen = sum(size for name, size in sizes.items() if ".layers.0." in name)
    assert shape.trained == sum(sizes.values()) - frozen and shape.weights == sum(sizes.values())
    lora = {"path": "unused", "lora": {"r": 4, "target_modules": ["q_proj"]}}
    tiny, methods = PlannedModel.of(tiny_model()), {"safety_layers": {"layers": [0]}}
    halved = ModelShape.of(tiny, run_config(model=lora, methods=methods))
    assert halved.trained * 2 == ModelShape.of(tiny, run_config(model=lora)).trained
    assert math.isclose(halved.trained, 4 * (32 + 32))


def test_what_cannot_be_frozen_is_refused():
    from safecl.engine.model.frozen import frozen_weights

    config = run_config(methods={"safety_layers": {"layers": [0]}})
    with pytest.raises(ConfigError, match="safety_layers would freeze all weights"):
        frozen_weights(config, ["model.layers.0.mlp.up_proj.weight"])
    tree = {
        "model": {"path": "m"},
        "tasks": [{"name": "a", "train": "a.jsonl", "role": "align"}, {"name": "b", "train": "b.jsonl"}],
        "methods": {"hft": {}},
        "output": "runs/a",
    }
    with pytest.raises(ConfigError, match="align in a run of its own"):
        validate_tree(tree, "run.yaml")
