"""The cosine of each decoder layer's input and output, averaged over tokens."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from safecl.distributed import collectives
from safecl.engine.model.language_model import LanguageModel


class LayerSimilarity:
    """Adds up the cosines in the forward passes inside `measuring`."""

    def __init__(self, model: LanguageModel, device: torch.device):
        self.layers = _decoder_layers(model.trunk)
        self.positions = torch.zeros(0, dtype=torch.int64, device=device)
        """The flat positions of the next pass that count."""
        self._sums = torch.zeros(len(self.layers) + 1, dtype=torch.float64, device=device)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        handles = [
            layer.register_forward_hook(functools.partial(self._add, number), with_kwargs=True)
            for number, layer in enumerate(self.layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def means(self) -> list[float]:
        """The mean cosine of each layer over all ranks. A collective call."""
        *sums, count = collectives.all_reduce_sum(self._sums).tolist()
        return [value / max(1.0, count) for value in sums]

    def _add(self, number: int, layer: nn.Module, inputs: Any, named: dict[str, Any], output: Any) -> None:
        before = inputs[0] if inputs else named["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        pair = [self._chosen(state) for state in (before, after)]
        self._sums[number] += nn.functional.cosine_similarity(pair[0], pair[1], dim=-1).sum().double()
        if number == 0:
            self._sums[-1] += len(self.positions)

    def _chosen(self, state: Tensor) -> Tensor:
        return state.flatten(0, 1)[self.positions].float()


def _decoder_layers(trunk: nn.Module) -> list[nn.Module]:
    lists = [module for module in trunk.modules() if isinstance(module, nn.ModuleList)]
    longest = max(lists, key=len)
    return list(longest)
