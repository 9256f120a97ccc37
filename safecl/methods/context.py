"""What a run offers to a method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from safecl.engine.zero.shard import Quantity, Shard


class Run(Protocol):
    """What the engine offers to a method. Every call must be made on all ranks alike."""

    step: int
    """Optimizer step of the current task, from 0."""
    num_steps: int
    """Optimizer steps of the current task."""
    seed: int
    has_adapters: bool
    """True with LoRA: the trained weights are the factors of updates."""

    def shards(self) -> list[Shard]:
        """This rank's part of the trained weights with its state tensors (fp32, flat)."""

    def reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks' shards of a few numbers, e.g. of local dot products."""

    def weight_names(self) -> list[str]:
        """Names of the trained weights; with LoRA, of the weights that have adapters."""

    def has_state(self, kind: str) -> bool:
        """True where the shards hold state of this kind, perhaps from an earlier task."""

    def set_anchor(self, kind: str = "anchor", *, moving: bool = False) -> None:
        """Copies the current weights into the state `kind`; a penalty is exactly 0 right after. `moving`: it will be
        written to (fp32)."""

    def estimate_fisher(
        self,
        *,
        sign_batches: int,
        rows_per_batch: int,
        kind: str = "fisher",
        rows: Literal["memory", "previous_task"] = "memory",
    ) -> float:
        """Estimates the diagonal Fisher on these rows into the state `kind`; returns its mean over all weights."""

    def load_fisher(self, path: str, kind: str = "fisher") -> float:
        """Loads what `safecl fisher` has written into the state `kind`; returns its mean over all weights."""

    def upper_threshold(self, kind: str, share: float) -> float:
        """The smallest value of the state `kind` (not negative) that at most this share of all weights exceeds. Two
        small all-reduces."""

    def memory_gradient(self, kind: str, stream: str) -> bool:
        """Gradient of the mean cross-entropy of a draw from the memory, at the current weights, into the state `kind`;
        weights stay.

        One more forward and backward. False where it was not finite; the state then holds nothing of this step.
        """

    def dots(self, shards: list[Shard], pairs: Sequence[tuple[Quantity, Quantity]]) -> torch.Tensor:
        """Dot products over all weights of pairs of quantities, each a function of a shard; fp64 [pairs], by one small
        all-reduce."""

    def publish(self) -> None:
        """Carries changed master weights into the live model."""

    def log(self, message: str) -> None:
        """A line for the console, from rank 0."""
