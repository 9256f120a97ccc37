"""The model that is trained, made without a copy of its own on every rank.

Its structure is built with parameters on the meta device; then each parameter becomes a view of the node's reference store. DeepSpeed takes
from there what a rank keeps (its shard, or a flat copy), so the node holds one whole model while it starts, whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from safecl.config import ConfigError, ModelConfig
from safecl.engine import distributed
from safecl.engine.batch import Layout
from safecl.engine.model import (
    DTYPES,
    LanguageModel,
    add_adapters,
    check_head,
    check_packing,
    choose_attention,
    first_line,
    read_model_settings,
)
from safecl.engine.reference import ReferenceStore


def open_language_model(
    config: ModelConfig, *, packing: str, tokens_per_microbatch: int, pad_id: int | None, note: Callable[[str], None]
) -> tuple[LanguageModel, Layout, ReferenceStore]:  # fmt: skip
    """A model with its head, checked and ready for an engine, how its micro-batches are laid out, and the store of its weights.

    A collective call. What a user should know is told through `note`. Raises ConfigError.
    """
    loaded, store = load_model(config)
    for message in store.notes:
        note(message)
    model = LanguageModel(loaded)
    if not check_head(model):
        note("the model's logits are more than a linear head; its own logits are used (more memory)")
    packed = packing == "packed" or (packing == "auto" and choose_attention(config.attention)[0] == "flash_attention_2")
    if packed:
        check_packing(model)
    return model, Layout(distributed.world_size(), tokens_per_microbatch, packed, pad_id=pad_id or 0), store


def load_model(config: ModelConfig) -> tuple[nn.Module, ReferenceStore]:
    """The causal language model in the run's dtype, adapters added where the config says so, and the store that its weights are views of.

    A collective call. The views are read-only: who changes a weight in place gives it memory of its own first. Raises ConfigError.
    """
    read_model_settings(config)
    attention, _ = choose_attention(config.attention)
    chosen = None if config.attention == "auto" and attention == "sdpa" else attention  # not every architecture has sdpa
    dtype = DTYPES[config.dtype]
    try:
        model = empty_model(config.path, dtype, attention=chosen, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"model.path: {config.path}: cannot be loaded: {first_line(error)}") from None
    store = ReferenceStore.open(config.path, dtype=dtype, model=model, trust_remote_code=config.trust_remote_code)
    take_weights(model, store)
    _take_generation_settings(model, config.path)
    model.config.use_cache = False
    return prepare_for_training(model, config), store


def prepare_for_training(model: nn.Module, config: ModelConfig) -> nn.Module:
    """Adds adapters and gradient checkpointing where the config says so."""
    if config.lora is not None:
        model = add_adapters(model, config)
    if config.gradient_checkpointing:
        # Reentrant checkpointing would hide hidden states from losses on features.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.lora is not None:
            model.enable_input_require_grads()
    return model


def empty_model(path: str, dtype: torch.dtype, *, attention: str | None = None, trust_remote_code: bool = False) -> nn.Module:
    """The causal language model's structure from its settings alone: parameters are on the meta device, buffers hold their values."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    chosen = {} if attention is None else {"attn_implementation": attention}
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(settings, dtype=dtype, trust_remote_code=trust_remote_code, **chosen)
    return model.eval()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside have parameters without memory. Buffers stay real: most are in no checkpoint and made by the module itself."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, p: nn.Parameter | None) -> None:
        register(module, name, p)
        if p is not None and not p.is_meta:  # a tied one that is there already stays the same object
            module._parameters[name] = nn.Parameter(p.to("meta"), requires_grad=p.requires_grad)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def take_weights(model: nn.Module, store: ReferenceStore) -> None:
    """Makes every parameter of an empty model a view of the store, tied ones the same object, and sets the buffers that were saved."""
    made: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for leaf, p in module._parameters.items():
            if p is not None:
                if id(p) not in made:
                    made[id(p)] = nn.Parameter(store.tensor(f"{path}.{leaf}".lstrip(".")), requires_grad=p.requires_grad)
                    made[id(made[id(p)])] = made[id(p)]
                module._parameters[leaf] = made[id(p)]
    for name, value in store.buffers.items():
        model.get_buffer(name).copy_(value)


def _take_generation_settings(model: nn.Module, path: str) -> None:
    """What the folder says of generation is saved again with the tuned model."""
    from transformers import GenerationConfig

    if model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(path)
        except (OSError, ValueError):
            return  # there is none: transformers derives one from the model's settings
