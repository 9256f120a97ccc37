"""Penalties of LoRA's products: what the merged weights have moved from theta_0 is D = (alpha / r) B A, which never exists whole here.

A pull is called with the model inside its forward pass, so that ZeRO-3 has the factors at hand; every rank's value counts 1 / world size,
as the gradient's mean over ranks does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from safecl.config import ConfigError
from safecl.engine.fisher_file import FisherFile
from safecl.kernels import lowrank_fisher_penalty

AdapterPull = Callable[[nn.Module], torch.Tensor]
"""A function of the model, 0-dim fp32."""


def base_model(model: nn.Module) -> nn.Module:
    """The causal language model under peft's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def adapters(model: nn.Module, patterns: tuple[str, ...] = ()) -> Iterator[tuple[str, nn.Module, nn.Module, float]]:
    """(name of the adapted weight, A, B, alpha / r) where the name matches one of the patterns; all without patterns."""
    for module_name, module in base_model(model).named_modules():
        name = f"{module_name}.weight"
        for adapter, a in getattr(module, "lora_A", {}).items():
            if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns):
                yield name, a, module.lora_B[adapter], module.scaling[adapter]


@dataclass(frozen=True)
class EvenPull:
    """0.5 * strength * sum ||(alpha / r) B A||_F^2 over the matching weights, from r x r products: ||B A||_F^2 = <B^T B, A A^T>."""

    strength: float
    patterns: tuple[str, ...] = ()

    def __call__(self, model: nn.Module) -> torch.Tensor:
        total = torch.zeros(())
        for _, a, b, scaling in adapters(model, self.patterns):
            a, b = a.weight.float(), b.weight.float()
            total = total.to(a.device) + scaling**2 * ((b.T @ b) * (a @ a.T)).sum()
        return 0.5 * self.strength * total


@dataclass(frozen=True)
class FisherPull:
    """0.5 * strength * sum F_ij D_ij^2 over all adapted weights; a rank has its share of each weight's rows of F, and sums these.

    shares: per weight, its first row and F of its rows [rows, in], bf16, on the device or in host memory.
    """

    strength: float
    shares: dict[str, tuple[int, torch.Tensor]]
    world_size: int

    def __call__(self, model: nn.Module) -> torch.Tensor:
        total = torch.zeros(())
        for name, a, b, scaling in adapters(model):
            first, fisher = self.shares[name]
            rows = b.weight[first : first + len(fisher)]
            total = total.to(rows.device) + lowrank_fisher_penalty(a.weight, rows, fisher, scaling)
        return self.strength * self.world_size * total


def read_fisher_pull(
    fisher: FisherFile, model: nn.Module, strength: float, *, rank: int, world_size: int, device: torch.device
) -> FisherPull:
    """This rank's share of the dense Fisher of all adapted weights, on `device` (pinned where that is the host of a GPU).

    Raises ConfigError where the file does not fit the model.
    """
    shapes = {name: _product_shape(a, b) for name, a, b, _ in adapters(model)}
    fisher.check_weights(shapes)
    shares = {}
    for name, (rows, columns) in shapes.items():
        first, last = rows * rank // world_size, rows * (rank + 1) // world_size
        values = fisher.read(name, first * columns, last * columns).view(last - first, columns)
        pinned = device.type == "cpu" and torch.cuda.is_available()
        shares[name] = first, values.pin_memory() if pinned else values.to(device)
    if not shares:
        raise ConfigError("methods.ewc.fisher: no weight of the model has an adapter")
    return FisherPull(strength / fisher.header.mean, shares, world_size)


def _product_shape(a: nn.Module, b: nn.Module) -> tuple[int, int]:
    """[out, in] of the weight that B A is added to, also where ZeRO-3 has taken the factors apart."""
    shapes = [tuple(getattr(module.weight, "ds_shape", module.weight.shape)) for module in (a, b)]
    return shapes[1][0], shapes[0][1]
