"""The memory of a pass is counted on tensors without memory, and equals that of a real pass."""

from __future__ import annotations

import pytest
import torch

from safecl.config import ModelConfig
from safecl.planning.costs.activations import LiveBytes, activation_bytes
from tests.engine import scenes

ROWS, LENGTH = 2, 48
LORA = {"r": 2, "alpha": 4.0}


def deep_model(family: str, layers: int = 7):
    """Return settings with more layers than are traced, so that the rest is extrapolated."""
    config = scenes.tiny_model(family=family).config
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i % len(config.layer_types)] for i in range(layers)]
    return config


def peak_of_a_real_pass(settings, config: ModelConfig) -> int:
    import transformers

    from safecl.engine.model.dtypes import CONFIG_DTYPES
    from safecl.engine.model.language_model import LanguageModel
    from safecl.engine.model.structure import prepare_for_training

    model = transformers.AutoModelForCausalLM.from_config(settings, dtype=CONFIG_DTYPES[config.dtype])
    model.config.use_cache = False
    wrapped, tokens = LanguageModel(prepare_for_training(model, config).train()), ROWS * LENGTH
    inputs = dict(
        input_ids=torch.zeros(ROWS, LENGTH, dtype=torch.int64), position_ids=torch.arange(LENGTH).expand(ROWS, -1),
        positions=torch.arange(tokens), targets=torch.zeros(tokens, dtype=torch.int64), ce_weights=torch.ones(tokens),
    )  # fmt: skip
    for p in wrapped.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    live = LiveBytes(known=[*wrapped.parameters(), *wrapped.buffers(), *inputs.values()])
    with live:
        wrapped(task="loss", **inputs)["loss"].backward()
    return live.peak


@pytest.mark.parametrize(
    ("family", "dtype", "checkpointing", "lora"),
    [("llama", "bf16", False, None), ("gemma", "bf16", True, None), ("llama", "fp32", True, LORA)],
)
def test_a_pass_without_memory_takes_what_a_real_one_takes(family, dtype, checkpointing, lora):
    config = ModelConfig(path="unused", dtype=dtype, gradient_checkpointing=checkpointing, lora=lora)
    settings = deep_model(family)
    found, real = activation_bytes(settings, config, (ROWS, LENGTH)), peak_of_a_real_pass(settings, config)
    assert found == pytest.approx(real, rel=0.05)


def test_checkpointing_saves_what_it_promises():
    takes = [
        activation_bytes(
            deep_model("llama", 20), ModelConfig(path="unused", gradient_checkpointing=checkpointing), (ROWS, LENGTH)
        )
        for checkpointing in (False, True)
    ]
    assert takes[1] < 0.3 * takes[0]


def test_bytes_are_counted_while_somebody_holds_them():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        view, b = a[10:], a * 2
        assert live.now == 8000
        del a, b
        assert live.now == 4000  # the view holds it
        del view
    assert live.now == 0 and live.peak == 8000


@pytest.mark.parametrize(("family", "answer"), [("llama", 6), ("llama", 0), ("gemma", 6)])
def test_an_evaluation_without_memory_takes_what_a_real_one_takes(family, answer):
    """The cache of keys and values grows with the answer; the logits of given answers are kept."""
    import transformers

    from safecl.engine.model.language_model import LanguageModel
    from safecl.evaluation.answers.likelihood import TOKENS_AT_ONCE
    from safecl.planning.costs.inference import inference_bytes
    from safecl.planning.passes import Inference

    settings = deep_model(family)
    batch = Inference(ROWS, LENGTH, answer)
    model = LanguageModel(transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.float32)).eval()
    ids, positions = torch.zeros(ROWS, LENGTH, dtype=torch.int64), torch.arange(LENGTH).expand(ROWS, -1)
    past = transformers.DynamicCache(config=model.model.config) if answer else None
    options = dict(past=past, use_cache=bool(answer), last_only=bool(answer))
    live = LiveBytes(known=[*model.parameters(), *model.buffers(), ids, positions])
    with live, torch.no_grad():
        model(task="logits", input_ids=ids, position_ids=positions, **options)
        for step in range(answer):
            model(task="logits", input_ids=ids[:, :1], position_ids=positions[:, :1] + LENGTH + step, **options)
    scored = 0 if answer else 4 * min(TOKENS_AT_ONCE, ROWS * LENGTH) * scenes.VOCAB
    found = inference_bytes(settings, ModelConfig(path="unused", dtype="fp32", gradient_checkpointing=False), batch)
    assert found == pytest.approx(live.peak + scored, rel=0.1)
