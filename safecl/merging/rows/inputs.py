"""Statistics of the inputs of linear layers, over all tokens of some rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from safecl.merging.rows.loaded import LinearLayer, LoadedModel
from safecl.merging.rows.reading import TokenRow

PRODUCT_BYTES = 4 * 2**30
"""Products of inputs that are held at a time; there is one pass of all rows for each such part of the layers."""


def input_squares(loaded: LoadedModel, rows: Sequence[TokenRow]) -> dict[str, torch.Tensor]:
    """Mean square of each input of each linear layer, fp64 [inputs] on the CPU, by the names of the weights."""
    layers = loaded.linear_layers()
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, inputs: torch.Tensor) -> None:
        squares = inputs.double().square().sum(0)
        sums[name] = sums[name] + squares if name in sums else squares

    _run(loaded, rows, layers, add)
    num_tokens = sum(len(row.ids) for row in rows)
    return {name: (total / num_tokens).cpu() for name, total in sums.items()}


class InputProducts:
    """H = 2/N sum x x^T over the inputs x of a linear layer, for all N tokens. Memory: PRODUCT_BYTES, or the largest
    matrix where that is more."""

    def __init__(self, loaded: LoadedModel, rows: Sequence[TokenRow], order: Sequence[str]):
        """order: the names of weights, in the order in which they are asked for."""
        layers = loaded.linear_layers()
        self.loaded, self.rows = loaded, rows
        self.layers = {name: layers[name] for name in order if name in layers}
        self._held: dict[str, torch.Tensor] = {}

    def take(self, name: str) -> torch.Tensor:
        """Return H of a layer: fp32 [inputs, inputs] on the CPU."""
        if name not in self._held:
            self._held = self._compute(self._next_part(name))
        return self._held.pop(name).cpu()

    def _next_part(self, first: str) -> dict[str, LinearLayer]:
        part: dict[str, LinearLayer] = {}
        names, size = list(self.layers), 0
        for name in names[names.index(first) :]:
            size += 4 * _num_inputs(self.layers[name]) ** 2
            if part and size > PRODUCT_BYTES:
                break
            part[name] = self.layers[name]
        return part

    def _compute(self, part: Mapping[str, LinearLayer]) -> dict[str, torch.Tensor]:
        device = self.loaded.device
        sums = {n: torch.zeros(_num_inputs(each), _num_inputs(each), device=device) for n, each in part.items()}
        factor = 2 / sum(len(row.ids) for row in self.rows)
        _run(self.loaded, self.rows, part, lambda name, x: sums[name].addmm_(x.float().T, x.float(), alpha=factor))
        return sums


def _num_inputs(layer: LinearLayer) -> int:
    weight = layer.module.weight
    assert isinstance(weight, torch.Tensor), "a linear layer has a weight"
    return int(weight.shape[0 if layer.transposed else 1])


@torch.no_grad()
def _run(
    loaded: LoadedModel,
    rows: Sequence[TokenRow],
    layers: Mapping[str, LinearLayer],
    add: Callable[[str, torch.Tensor], object],
) -> None:
    """Run all rows, and give `add` the inputs of each layer, [tokens, inputs]."""
    with _hooks(layers, add):
        for _ in loaded.run(rows):
            pass


@contextmanager
def _hooks(layers: Mapping[str, LinearLayer], add: Callable[[str, torch.Tensor], object]) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def take(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            add(name, inputs[0].flatten(0, -2))

        return take

    handles = [layer.module.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
