"""Rebase: moves what a model was tuned for onto a re-aligned base, without the data of its tuning.

    V = W_new - W_old,    tau = W_tuned - W_old
    W = W_new + scale tau',    tau' = tau off the safety update V

    conflict   tau' = tau - min(0, <tau, V>) / <V, V> V        what goes against V is taken away, tensor by tensor
    columns    tau' = tau - U U^T tau                          U: the `rank` first left singular vectors of V
    none       tau' = tau                                      task arithmetic on the new base

`columns` is for matrices of the blocks; all other tensors are projected as by `conflict`. The base is the old one, the
aligned model the new one. Sources: task vectors, Ilharco et al., arXiv 2212.04089; the projection of conflicting
directions, Yu et al., Gradient Surgery, arXiv 2001.06782, here of weights. The combination is ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from safecl.config import ConfigError
from safecl.merging import base
from safecl.merging.places import Coefficient
from safecl.merging.safety._direction import check_direction

if TYPE_CHECKING:
    import torch

EXACT_UP_TO = 1024
"""Size of the smaller side up to which singular vectors are exact."""


class Config(base.MergeConfig):
    """Task vector of the old base, off the safety update, on the new base."""

    needs: ClassVar[base.Needs] = base.Needs(base="yes", aligned="yes", most=1)

    scale: Coefficient = 1.0
    """Factor of the task vector; 0 is the new base."""
    projection: Literal["conflict", "columns", "none"] = "conflict"
    """conflict: take away what goes against the safety update; columns: all that lies in its main directions; none: add
    the task vector as it is."""
    rank: Annotated[int, Field(ge=1)] = 16
    """Number of main directions of each matrix with `columns`."""


class Merge(base.Merge[Config]):
    def prepare(self) -> None:
        if self.config.adapter_rank is not None:
            raise ConfigError(
                "rebase.adapter_rank: the result differs from the old base by the whole safety update, which no "
                "adapter of it holds; leave adapter_rank out"
            )
        check_direction(self.models)
        self.kept, self.before = 0.0, 0.0

    def combine(self, tensors: base.Tensors) -> torch.Tensor:
        from safecl.merging.arithmetic import dot

        new = tensors.needed_aligned
        task = tensors.tuned[0].sub_(tensors.needed_base)
        update = tensors.needed_base.neg_().add_(new)
        self.before += dot(task, task)
        self._project_(task, update, tensors.place.block is not None)
        self.kept += dot(task, task)
        return new.add_(task, alpha=tensors.value(self.config.scale))

    def _project_(self, task: torch.Tensor, update: torch.Tensor, in_block: bool) -> None:
        from safecl.merging.arithmetic import dots

        if self.config.projection == "none":
            return
        if self.config.projection == "columns" and in_block and task.dim() == 2:
            directions = main_directions(update, self.config.rank)
            task.sub_(directions @ (directions.T @ task))
            return
        square, _, along = dots(update, task)
        if square > 0 and along < 0:
            task.sub_(update, alpha=along / square)

    def notes(self) -> list[str]:
        share = (self.kept / self.before) ** 0.5 if self.before else 0.0
        return [f"the task vector keeps {share:.1%} of its length off the safety update"]


def main_directions(update: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the first left singular vectors of a matrix, [rows, rank], without those of singular value 0."""
    import torch

    if min(update.shape) <= EXACT_UP_TO:
        u, s, _ = torch.linalg.svd(update, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, _ = torch.svd_lowrank(update, min(rank + 16, *update.shape), niter=4)
    found: torch.Tensor = u[:, :rank][:, s[:rank] > 1e-6 * max(float(s[0]), 1e-30)]
    return found
