"""The direction of alignment, and how far a tuned model's change lies in it.

    V = W_aligned - W_base,    D = W_tuned - W_aligned,    C = V V^T / |V|_F,    cosine = <C D, D> / (|C D| |D|)

C is the cheap stand-in of Hsu et al. (arXiv 2405.16833) for the projector V (V^T V)^-1 V^T. Its eigenvalues are
sigma^2 / |V|_F for the singular values sigma of V, so C also scales what it keeps. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from safecl.config import ConfigError
from safecl.merging import base
from safecl.merging.places import Coefficient

if TYPE_CHECKING:
    import torch


class DirectionConfig(base.MergeConfig):
    """Settings of merges that compare each matrix of the blocks with the direction of alignment."""

    needs: ClassVar[base.Needs] = base.Needs(base="yes", aligned="yes", most=1)

    threshold: Coefficient
    """Cosine between a matrix's change and its projection under which the matrix is treated; -1 leaves it alone, 1
    treats it in any case."""


@dataclass(frozen=True)
class Compared:
    """A matrix's change D, its projection C D, and their cosine. The values are new tensors: [rows, columns], fp32."""

    change: torch.Tensor
    projected: torch.Tensor
    cosine: float


def check_direction(models: base.Models) -> None:
    """Raise ConfigError where the aligned model has the weights of the base."""
    import torch

    from safecl.merging.memory import PIECE_ELEMENTS

    before, aligned = models.base, models.aligned
    assert before is not None and aligned is not None, "the merge says that it needs both"
    for name in models.places:
        shape = aligned.shapes[name]
        step = max(1, PIECE_ELEMENTS // max(1, math.prod(shape[1:])))
        for start in range(0, shape[0] if shape else 1, step):
            if not torch.equal(before.read(name, start, start + step), aligned.read(name, start, start + step)):
                return
    raise ConfigError(
        f"{aligned.label}: has the weights of {before.label}, so there is no direction of alignment; --base is the "
        "model before it was aligned"
    )


def compare(tensors: base.Tensors) -> Compared | None:
    """Compare a matrix's change with the direction of alignment, in the memory of the base's values.

    Returns None for tensors that are no matrix of a block, and where tuning or alignment has changed nothing.
    """
    from safecl.merging.arithmetic import dot, dots

    tuned, aligned = tensors.tuned[0], tensors.needed_aligned
    if tensors.place.block is None or tuned.dim() != 2:
        return None
    direction = tensors.needed_base.neg_().add_(aligned)
    length = math.sqrt(dot(direction, direction))
    change = tuned - aligned
    if length == 0 or not bool(change.any()):
        return None
    projected = _projected(direction, change).div_(length)
    own, other, both = dots(projected, change)
    lengths = math.sqrt(own * other)
    return Compared(change, projected, both / lengths if lengths > 0 else 0.0)


def _projected(direction: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Return V V^T D, by the smaller of the two inner products."""
    rows, columns = direction.shape
    if rows <= columns:
        return (direction @ direction.T) @ change
    return direction @ (direction.T @ change)


def summary(cosines: Mapping[str, float], treated: int, done: str) -> list[str]:
    """Return the report's line. cosines: of each matrix that was compared. done: what happened to the treated ones."""
    if not cosines:
        return ["no matrix of a block was changed by both tuning and alignment; the result is the tuned model"]
    lowest = min(cosines, key=lambda name: cosines[name])
    return [
        f"{treated} of {len(cosines)} matrices {done}; cosines from {cosines[lowest]:.4f} ({lowest}) to "
        f"{max(cosines.values()):.4f}"
    ]
