"""Make a model without weights, and prepare a model for training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from safecl.config import ModelConfig
from safecl.engine.model.adapters import add_adapters
from safecl.engine.model.tied_head import separate_head
from safecl.storage.model_folder import settings_source

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def prepare_for_training(model: nn.Module, config: ModelConfig) -> nn.Module:
    """Return the model with the adapters and the gradient checkpointing that the config asks for."""
    if config.lora is not None:
        model = add_adapters(model, config)
    if config.gradient_checkpointing:
        pretrained = cast("PreTrainedModel", model)
        # Reentrant checkpointing would give hidden states that losses use no gradient.
        if hasattr(pretrained, "activation_checkpointing_enable"):  # newer transformers, which warn of the older name
            pretrained.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:
            pretrained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.lora is not None:
            pretrained.enable_input_require_grads()
    return model


def empty_model(
    path: str, dtype: torch.dtype, *, attention: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Return the causal language model that transformers makes of the folder: parameters are on the meta device,
    buffers hold their values.

    Where the settings tie the head to the embedding and the files hold two different tensors, transformers ties
    nothing, and neither does this.
    """
    from transformers import AutoConfig

    source, options = settings_source(path)
    settings = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **options)
    model = _from_settings(settings, dtype, attention, trust_remote_code)
    if separate_head(model, path) is not None:
        for part in (settings, settings.get_text_config()):
            part.tie_word_embeddings = False
        model = _from_settings(settings, dtype, attention, trust_remote_code)
    return model.eval()


def _from_settings(
    settings: PretrainedConfig, dtype: torch.dtype, attention: str | None, trust_remote_code: bool
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    chosen = {} if attention is None else {"attn_implementation": attention}
    with parameters_on_meta():
        return AutoModelForCausalLM.from_config(settings, dtype=dtype, trust_remote_code=trust_remote_code, **chosen)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Gives the parameters of modules that are made inside no memory. Buffers stay real: most of them are in no
    checkpoint, because the module makes them itself."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, p: nn.Parameter | None) -> None:
        register(module, name, p)
        if p is not None and not p.is_meta:  # a tied parameter that is on meta already stays the same object
            module._parameters[name] = empty = nn.Parameter(p.to("meta"), requires_grad=p.requires_grad)
            empty._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers draws no values for it

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]  # for a while
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]  # as before
