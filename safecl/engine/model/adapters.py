"""Penalties of LoRA's products: what the merged weights have moved from theta_0 is D = (alpha / r) B A, which never
exists whole here.

A pull is called with the model inside its forward pass, so that ZeRO-3 has the factors at hand; every rank's value
counts 1 / world size, as the gradient's mean over ranks does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from safecl.config import ConfigError, ModelConfig
from safecl.engine.model.dtypes import CONFIG_DTYPES
from safecl.engine.model.settings import first_line

AdapterPull = Callable[[nn.Module], torch.Tensor]
"""A function of the model, 0-dim fp32."""


def base_model(model: nn.Module) -> nn.Module:
    """The causal language model under peft's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def adapters(model: nn.Module, patterns: tuple[str, ...] = ()) -> Iterator[tuple[str, nn.Module, nn.Module, float]]:
    """(name of the adapted weight, A, B, alpha / r) where the name matches one of the patterns; all without
    patterns."""
    for module_name, module in base_model(model).named_modules():
        name = f"{module_name}.weight"
        for adapter, a in getattr(module, "lora_A", {}).items():
            if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns):
                yield name, a, module.lora_B[adapter], module.scaling[adapter]


@dataclass(frozen=True)
class EvenPull:
    """0.5 * strength * sum ||(alpha / r) B A||_F^2 over the matching weights, from r x r products: ||B A||_F^2 = <B^T
    B, A A^T>."""

    strength: float
    patterns: tuple[str, ...] = ()

    def __call__(self, model: nn.Module) -> torch.Tensor:
        total = torch.zeros(())
        for _, a, b, scaling in adapters(model, self.patterns):
            a, b = a.weight.float(), b.weight.float()
            total = total.to(a.device) + scaling**2 * ((b.T @ b) * (a @ a.T)).sum()
        return 0.5 * self.strength * total


def add_adapters(model: nn.Module, config: ModelConfig) -> nn.Module:
    try:
        import peft
    except ImportError:
        raise ConfigError("model.lora needs the extra `lora`: pip install 'safecl[lora]'") from None
    lora = config.lora
    settings = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        model = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(f"model.lora: {first_line(error)}") from None
    for p in model.parameters():  # one dtype per shard
        if p.requires_grad:
            p.data = p.data.to(CONFIG_DTYPES[config.dtype])
    return model
