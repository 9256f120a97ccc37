"""The interfaces that a method sees: the run, and this rank's shards of the trained weights.

The engine's classes satisfy these protocols by their structure, so a method imports nothing of the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch


class Piece(Protocol):
    """A slice of a shard with its state there, on the shard's device."""

    where: slice
    """Elements of the flat shard, `param.view(-1)`."""
    state: dict[str, torch.Tensor]
    """State of this slice by kind, 1-D."""


class Shard(Protocol):
    """One flat tensor of this rank's part of the trained weights, with gradient and state in the same layout."""

    param: torch.Tensor
    """Master weights: fp32, 1-D (in ZeRO stage 0, the parameter's own shape)."""
    state: dict[str, torch.Tensor]
    """State by kind. Use `pieces` for a kind that may be kept in host memory or in the reference store."""

    @property
    def grad(self) -> torch.Tensor:
        """Gradient of the step, fp32, in the layout of `param`."""

    def pieces(self, kinds: Sequence[str], written: Collection[str] = ()) -> Iterator[Piece]:
        """Yield the shard in pieces with its state of these kinds, from any place; changes to the kinds in `written`
        are kept."""

    def keep(self, kind: str, values: torch.Tensor) -> None:
        """Store `values` (the layout of `param`) as the state `kind`, in the place and dtype of that kind."""


Quantity = Callable[[Shard], "torch.Tensor"]
"""One value per weight as a function of a shard: its gradient, a kind of state."""


class Run(Protocol):
    """The interface of a run for its methods. Every rank must make the same calls in the same order."""

    seed: int
    has_adapters: bool
    """True with LoRA: the trained weights are the factors of updates."""

    @property
    def step(self) -> int:
        """Optimizer step of the current task, from 0."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the current task."""

    def shards(self) -> Sequence[Shard]:
        """This rank's part of the trained weights with its state tensors (fp32, flat)."""

    def reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a few numbers over the ranks' shards, e.g. of local dot products."""

    def weight_names(self) -> list[str]:
        """Names of the trained weights; with LoRA, of the weights that have adapters."""

    def has_state(self, kind: str) -> bool:
        """True where the shards hold state of this kind, perhaps from an earlier task."""

    def set_anchor(self, kind: str = "anchor", *, moving: bool = False) -> None:
        """Copy the current weights into the state `kind`; a penalty is exactly 0 right after. `moving` (fp32): the
        method will write to it."""

    def estimate_fisher(
        self,
        *,
        sign_batches: int,
        rows_per_batch: int,
        kind: str = "fisher",
        rows: Literal["memory", "previous_task"] = "memory",
    ) -> float:
        """Estimate the diagonal Fisher on these rows into the state `kind`; returns its mean over all weights."""

    def load_fisher(self, path: str, kind: str = "fisher") -> float:
        """Load a file of `safecl fisher` into the state `kind`; returns its mean over all weights."""

    def upper_threshold(self, kind: str, share: float) -> float:
        """The smallest value of the state `kind` (not negative) that at most this share of all weights exceeds, by two
        small all-reduces."""

    def memory_gradient(self, kind: str, stream: str) -> bool:
        """Put the gradient of the mean cross-entropy of a draw from the memory, at the current weights, into the state
        `kind`; the weights stay.

        Costs one more forward and backward. False where the gradient was not finite; the state then holds nothing of
        this step.
        """

    def dots(self, shards: Sequence[Shard], pairs: Sequence[tuple[Quantity, Quantity]]) -> torch.Tensor:
        """Dot products over all weights of pairs of quantities: fp64 [pairs], by one small all-reduce."""

    def publish(self) -> None:
        """Copy changed master weights into the live model."""

    def log(self, message: str) -> None:
        """Print a line on the console, from rank 0."""
