"""An outline says of a model what the model itself says, and survives being written as JSON."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from safecl.engine.model.outline import Outline
from tests.engine.checkpoint.families import FAMILIES
from tests.engine.scenes import tiny_model


def model_of(family: str):
    import transformers

    settings = transformers.AutoConfig.for_model(family.partition("-")[0], **FAMILIES[family])
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_outline_says_what_the_model_says(family):
    model = model_of(family)
    text, outline = model.config.get_text_config(), Outline.of(model)
    assert outline.num_parameters == model.num_parameters() and outline.model_type == model.config.model_type
    assert {name: list(shape) for name, shape in outline.parameters.items()} == {
        name: list(p.shape) for name, p in model.named_parameters()
    }
    assert outline.vocabulary == model.get_input_embeddings().num_embeddings
    stated = (outline.vocab_size, outline.hidden_size, outline.num_hidden_layers, outline.tied)
    assert stated == (text.vocab_size, text.hidden_size, text.num_hidden_layers, bool(text.tie_word_embeddings))
    assert outline.positions == getattr(text, "max_position_embeddings", None)
    for name in outline.layers:
        layer = model.get_submodule(name)
        assert sum(p.numel() for p in layer.parameters()) == sum(
            torch.Size(shape).numel() for shape in outline.in_layer(name)
        )
    assert len(outline.layers) == text.num_hidden_layers
    for name, size in outline.linear.items():
        assert model.get_submodule(name).weight.shape == size[::-1] and name != "lm_head"
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.get_output_embeddings()]
    assert len(outline.linear) == len(linear)
    assert outline.untied is None and outline.fixed == ()
    assert Outline.from_json(json.loads(json.dumps(outline.to_json()))) == outline


def test_weights_without_a_gradient_and_tables_of_positions_are_named():
    model = model_of("opt")
    assert Outline.of(model).tables == (66,)  # 64 positions, and OPT's two rows before the first
    model.lm_head.weight.requires_grad_(False)
    outline = Outline.of(model)
    assert outline.fixed == ("model.decoder.embed_tokens.weight",)
    assert set(outline.trained) == set(outline.parameters) - set(outline.fixed)


def test_a_head_of_its_own_beside_settings_that_tie_it_is_named():
    model, says = tiny_model(), tiny_model(tied=True).config
    assert Outline.of(model, says).untied == ("lm_head.weight", "model.embed_tokens.weight")
    assert Outline.of(model).untied is None and Outline.of(tiny_model(tied=True)).untied is None


@pytest.mark.parametrize(
    "damage",
    [
        {"parameters": {}},
        {"parameters": {"a": "text"}},
        {"parameters": [1]},
        {"layers": []},
        {"layers": None},
        {"linear": {"a": 1}},
        {"untied": 5},
        {"vocab_size": None},
        {"surplus": 1},
    ],
)
def test_anything_else_is_no_outline(damage):
    whole = json.loads(json.dumps(Outline.of(tiny_model()).to_json()))
    assert Outline.from_json(whole) is not None
    assert Outline.from_json(whole | damage) is None
    assert Outline.from_json({key: value for key, value in whole.items() if key != "tables"}) is None
    assert Outline.from_json(None) is None and Outline.from_json([1, 2]) is None
