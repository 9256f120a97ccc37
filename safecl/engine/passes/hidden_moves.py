"""Hidden states moved along their own gradient: the outputs of the attention modules, between two passes over the same
micro-batches.

    first pass     the gradient g of the loss with regard to each output is kept
    second pass    rho * g / ||g|| is added to the outputs; the norm is over all tokens, layers and ranks of the step

The gradients have the outputs' dtype and stay on the device between the passes: layers x tokens of a rank x hidden
size. Forward hooks do both, so it works in every ZeRO stage. With activation checkpointing a layer's forward runs again
during the backward pass, and gets the same move again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from safecl.distributed import collectives
from safecl.engine.model.language_model import LanguageModel
from safecl.methods.terms import HiddenMove

ATTENTION = ("self_attn", "attention", "attn")
"""Names of attention modules inside decoder layers."""


class HiddenMoves:
    """The moves of one step. Call `recording`, then `normalise`, then `moving`."""

    def __init__(self, model: LanguageModel, move: HiddenMove):
        self.model, self.rho = model, move.rho
        everywhere = [m for name, m in model.trunk.named_modules() if name.rpartition(".")[2] in ATTENTION]
        assert everywhere, "the model has no module named like attention"
        self.modules = everywhere if move.layers is None else [everywhere[layer] for layer in move.layers]
        self._gradients: dict[tuple[int, int], Tensor] = {}
        """By micro-batch and module."""
        self._micro_batch = -1
        self._factor = 0.0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the gradients of a pass."""
        with self._hooked(self._record):
            yield

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Add the moves to the outputs of a pass over the same micro-batches."""
        with self._hooked(self._add):
            yield

    def normalise(self) -> None:
        """Set the length of the moves. A collective call; a gradient that is not finite moves nothing."""
        own = sum((g.double().square().sum() for g in self._gradients.values()), torch.zeros((), dtype=torch.float64))
        norm = float(collectives.all_reduce_sum(own.view(1)).sqrt())
        self._factor = self.rho / norm if norm > 0 and norm < float("inf") else 0.0

    def norms(self) -> list[float]:
        """Return the norm of each module's gradient over all tokens of the pass. A collective call."""
        squares = torch.zeros(len(self.modules), dtype=torch.float64, device=collectives.device())
        for (_, number), gradient in self._gradients.items():
            squares[number] += gradient.double().square().sum()
        found: list[float] = collectives.all_reduce_sum(squares).sqrt().tolist()
        return found

    @contextmanager
    def _hooked(self, work: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
        self._micro_batch = -1
        handles = [self.model.register_forward_pre_hook(self._count)]
        for number, module in enumerate(self.modules):
            handles.append(module.register_forward_hook(functools.partial(self._on_output, work, number)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _count(self, module: nn.Module, inputs: Any) -> None:
        self._micro_batch += 1

    def _on_output(
        self, work: Callable[[int, Tensor], Tensor | None], number: int, module: nn.Module, inputs: Any, output: Any
    ) -> Any:
        changed = work(number, output[0] if isinstance(output, tuple) else output)
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def _record(self, number: int, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(functools.partial(self._keep, (self._micro_batch, number)))

    def _keep(self, key: tuple[int, int], gradient: Tensor) -> None:
        self._gradients[key] = gradient.detach().clone()

    def _add(self, number: int, output: Tensor) -> Tensor | None:
        gradient = self._gradients.get((self._micro_batch, number))
        return None if gradient is None else output + (self._factor * gradient.float()).to(output.dtype)
