"""Penalties of LoRA's products D = (alpha / r) B A, which are what the merged weights have moved from theta_0.

D itself is never formed. A penalty is called with the model inside the model's forward pass, where ZeRO-3 has the
factors at hand. Every rank's value counts 1 / world size, as the gradient's mean over ranks does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from safecl.engine.model.adapters import adapters

AdapterPenalty = Callable[[nn.Module], torch.Tensor]
"""A function of the model; returns a 0-dim fp32 tensor."""


@dataclass(frozen=True)
class OutsideAlignmentPenalty:
    """strength * sum ||(I - U U^T) (alpha / r) B A||_F^2 over all adapted weights.

    directions: U by weight, [out, in]. With P = B - U (U^T B) it is <P^T P, A A^T>, without a product.
    """

    strength: float
    directions: Mapping[str, torch.Tensor]

    def __call__(self, model: nn.Module) -> torch.Tensor:
        total = torch.zeros(())
        for name, module_a, module_b, scaling in adapters(model):
            a, b = module_a.weight.float(), module_b.weight.float()
            u = self.directions[name].float()
            outside = b - u @ (u.T @ b)
            total = total.to(a.device) + scaling**2 * ((outside.T @ outside) * (a @ a.T)).sum()
        return self.strength * total


@dataclass(frozen=True)
class EvenAdapterPenalty:
    """0.5 * strength * sum_l f_l ||(alpha / r) B A||_F^2 over the matching weights, with f_l = 1 unless `factors` names
    the weight.

    It needs r x r products only: ||B A||_F^2 = <B^T B, A A^T>.
    """

    strength: float
    patterns: tuple[str, ...] = ()
    factors: tuple[tuple[str, float], ...] = ()

    def __call__(self, model: nn.Module) -> torch.Tensor:
        total, factors = torch.zeros(()), dict(self.factors)
        for name, module_a, module_b, scaling in adapters(model, self.patterns):
            a, b = module_a.weight.float(), module_b.weight.float()
            factor = factors.get(name, 1.0) * scaling**2
            total = total.to(a.device) + factor * ((b.T @ b) * (a @ a.T)).sum()
        return 0.5 * self.strength * total
