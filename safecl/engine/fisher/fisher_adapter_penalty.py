"""The penalty on LoRA's products, weighted by a dense Fisher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from safecl.config import ConfigError
from safecl.distributed import devices
from safecl.engine.fisher.file import FisherFile
from safecl.engine.model.adapters import adapters
from safecl.kernels import lowrank_fisher_penalty, page_locked


@dataclass(frozen=True)
class FisherPull:
    """0.5 * strength * sum F_ij D_ij^2 over all adapted weights, where D = B A is an adapter's product.

    A rank has a share of each weight's rows of F, and sums over these. shares: by weight, the first row of the share,
    and F of its rows, [rows, in] in bf16 on the device or in host memory.
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
    """Read this rank's share of the dense Fisher of all adapted weights to `device`.

    It is pinned where `device` is the CPU of a machine with a GPU. Raises ConfigError where the file does not fit the
    model.
    """
    shapes = {name: _product_shape(a, b) for name, a, b, _ in adapters(model)}
    fisher.check_weights(shapes)
    shares = {}
    for name, (rows, columns) in shapes.items():
        first, last = rows * rank // world_size, rows * (rank + 1) // world_size
        values = fisher.read(name, first * columns, last * columns).view(last - first, columns)
        pinned = device.type == "cpu" and devices.on_gpu()
        shares[name] = first, page_locked.copy_of(values) if pinned else values.to(device)
    if not shares:
        raise ConfigError("fisher: no weight of the model has an adapter, so a dense Fisher has nothing to weigh")
    return FisherPull(strength / fisher.header.mean, shares, world_size)


def _product_shape(a: nn.Linear, b: nn.Linear) -> tuple[int, int]:
    """Shape [out, in] of the weight that B A is added to, also where ZeRO-3 has sharded the factors."""
    shapes = [tuple(getattr(module.weight, "ds_shape", module.weight.shape)) for module in (a, b)]
    return shapes[1][0], shapes[0][1]
