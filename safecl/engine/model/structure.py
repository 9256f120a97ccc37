"""A model without weights, and what it needs before training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from safecl.config import ModelConfig
from safecl.engine.model.adapters import add_adapters


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


def empty_model(
    path: str, dtype: torch.dtype, *, attention: str | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """The causal language model's structure from its settings alone: parameters are on the meta device, buffers hold
    their values."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    chosen = {} if attention is None else {"attn_implementation": attention}
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(settings, dtype=dtype, trust_remote_code=trust_remote_code, **chosen)
    return model.eval()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside have parameters without memory. Buffers stay real: most are in no checkpoint and made by the
    module itself."""
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
