"""Gradients of the mean of some losses, over all parameters of a model in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from safecl.merging.base import Unmergeable
from safecl.merging.rows.loaded import LoadedModel, answer_loss
from safecl.merging.rows.reading import TokenRow


@dataclass(frozen=True)
class Gradient:
    """The gradient lies in the parameters. loss: mean over the rows. norm: over all parameters, in fp64."""

    loaded: LoadedModel
    loss: float
    norm: float

    def move_(self, length: float) -> None:
        """Move the parameters by this length along the gradient, and drop it. A gradient of 0 moves nothing."""
        for parameter in self.loaded.parameters.values():
            if parameter.grad is not None and self.norm > 0:
                parameter.data.add_(parameter.grad, alpha=length / self.norm)
            parameter.grad = None


def mean_gradient(loaded: LoadedModel, rows: Sequence[TokenRow]) -> Gradient:
    """Put the gradient of the mean over rows of the loss of their answers into the parameters.

    Raises Unmergeable where it is not finite.
    """
    return gradient_of(loaded, answer_losses(loaded, rows), len(rows))


def answer_losses(loaded: LoadedModel, rows: Sequence[TokenRow]) -> Iterable[torch.Tensor]:
    """Yield the loss of each row's answer, 0-dim."""
    for row, logits in loaded.run(rows):
        yield answer_loss(logits, row)


def gradient_of(loaded: LoadedModel, losses: Iterable[torch.Tensor], count: int) -> Gradient:
    """Put the gradient of the mean of `count` losses, 0-dim each, into the parameters; each graph is freed before the
    next loss is formed. Raises Unmergeable where it is not finite."""
    total = 0.0
    for loss in losses:
        (loss / count).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        total += float(loss.detach()) / count
    gradients = [p.grad for p in loaded.parameters.values() if p.grad is not None]
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    if not math.isfinite(norm):
        raise Unmergeable("the gradient on the rows is not finite, so it gives no direction")
    return Gradient(loaded, total, norm)
