"""Features: hidden states of several layers side by side, one vector per token.

Layers are counted from 1. The last layer's hidden states are those behind the final norm, as transformers counts them;
all others are taken directly behind their layer.

A row's distance to Gaussian noise is the squared maximum mean discrepancy (MMD) of its hidden states z_t behind a layer
and as many draws e_t of N(0, 1), averaged over the layers:

    MMD^2   = mean_st (k(z_s, z_t) + k(e_s, e_t) - k(z_s, e_t) - k(e_s, z_t))
    k(a, b) = sum_i exp(-|a - b|^2 / (2^i w))

with i = -2, ..., 2 and w the mean of |a - b|^2 over all pairs of two different vectors, which has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from safecl.config import ConfigError

Layers = tuple[int, ...]
"""Numbers of layers, ascending; empty for the last layer alone."""

KERNEL_WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Widths of the Gaussian kernels, times the mean squared distance."""


def layer_numbers(wanted: int | Sequence[int], num_layers: int, key: str = "layers") -> Layers:
    """Return the layers of a feature vector.

    wanted: how many layers, at equal distances and with the last; or their numbers, negative ones from the end (-1 is
    the last). key: the setting that names them, for messages. Raises ConfigError for a layer that the model has not.
    """
    if isinstance(wanted, int):
        count = min(wanted, num_layers)
        found = [-(-num_layers * (i + 1) // count) for i in range(count)]
    else:
        found = sorted({number + num_layers + 1 if number < 0 else number for number in wanted})
        if outside := [number for number in wanted if not 1 <= abs(number) <= num_layers]:
            raise ConfigError(f"{key}: {outside[0]} is no layer; the model has layers 1 to {num_layers}")
    return () if found in ([], [num_layers]) else tuple(found)


def features_at(layers: Layers, last: Tensor, each: Sequence[Tensor], positions: Tensor) -> Tensor:
    """Return features [n, len(layers) * H] at flat positions [n].

    last: hidden states of the last layer [tokens, H]. each: those before and behind every layer, [tokens, H] each; only
    read where `layers` is not empty.
    """
    if not layers:
        return last[positions]
    return torch.cat([each[number][positions] for number in layers], dim=-1)


def final_norm(trunk: nn.Module) -> nn.Module:
    """Return the norm behind the last layer; the identity for a model without one."""
    found = [module for name, module in trunk.named_children() if "norm" in name or name.startswith("ln_")]
    return found[-1] if found else nn.Identity()


def noise_distances(each: Sequence[Tensor], positions: Tensor, counts: list[int], seeds: list[int]) -> Tensor:
    """Return the distance of each row's hidden states to Gaussian noise, fp32 [rows].

    each: hidden states behind every layer, [tokens, H] each. positions: flat indices [sum of counts] of the rows'
    tokens. counts, seeds: of each row.
    """
    states = torch.stack([layer[positions] for layer in each]).float()  # [layers, positions, H]
    found = []
    for own, seed in zip(states.split(counts, dim=1), seeds, strict=True):
        generator = torch.Generator(own.device).manual_seed(seed)
        draws = torch.randn(own.shape, generator=generator, device=own.device)
        found.append(_discrepancies(own, draws).mean())
    return torch.stack(found)


def _discrepancies(states: Tensor, draws: Tensor) -> Tensor:
    """MMD^2 of each layer, [layers]. states, draws: [layers, n, H]."""
    both = torch.cat([states, draws], dim=1)
    lengths = both.square().sum(-1)
    squares = (lengths[:, :, None] + lengths[:, None, :] - 2.0 * both @ both.mT).clamp_min(0.0)
    count = both.shape[1]
    width = squares.detach().sum((1, 2), keepdim=True) / (count * count - count)
    kernel = torch.stack([torch.exp(-squares / (factor * width)) for factor in KERNEL_WIDTHS]).sum(0)
    sign = torch.ones(count, device=both.device)
    sign[count // 2 :] = -1.0
    return (kernel * sign[:, None] * sign).mean((1, 2)) * 4.0
