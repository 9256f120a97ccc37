"""Gradients of the loss of answers, over all parameters of a model in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
    total = 0.0
    for row, logits in loaded.run(rows):
        loss = answer_loss(logits, row) / len(rows)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        total += float(loss.detach())
    gradients = [p.grad for p in loaded.parameters.values() if p.grad is not None]
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    if not math.isfinite(norm):
        raise Unmergeable("the gradient on the rows is not finite, so it gives no direction")
    return Gradient(loaded, total, norm)
