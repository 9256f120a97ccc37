"""The interfaces that a method sees: the run, and this rank's shards of the trained weights.

The engine's classes satisfy these protocols by their structure, so a method imports nothing of the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from safecl.methods.terms import ReplayTerm

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


@dataclass(frozen=True)
class TensorPart:
    """The elements of one trained tensor that lie next to each other in one of this rank's shards."""

    number: int
    """Number of the tensor, the same on every rank; an index into the result of `Run.dots_per_tensor`."""
    name: str
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    shard: Shard
    where: slice
    """Elements of the flat shard, `param.view(-1)`."""
    offset: int
    """The first of them, counted in the flattened tensor."""


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

    @property
    def learning_rate(self) -> float:
        """Learning rate of the last step that was made, of this one after its update; 0 before the first."""

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

    def fisher_mean(self, kind: str) -> float:
        """Mean over all weights of a kind of Fisher state."""

    def upper_threshold(self, kind: str, share: float) -> float:
        """The smallest value of the state `kind` (not negative) that at most this share of all weights exceeds, by two
        small all-reduces."""

    def memory_gradient(self, kind: str, draw: ReplayTerm) -> bool:
        """Put the gradient of the loss of a draw from the memory, at the current weights, into the state `kind`; the
        weights stay.

        Costs one more forward and backward. False where the gradient was not finite; the state then holds nothing of
        this step. A draw of `Method.gradient_draws` is read one step ahead.
        """

    def gradient_loss(self, draw: ReplayTerm) -> float:
        """The loss of a draw in the pass of the last `memory_gradient` in this step, weights included."""

    def task_gradient(self, kind: str) -> bool:
        """Put the gradient of the cross-entropy of the task rows that this step trains (or of the draw in their place),
        at the current weights, into the state `kind`, as `memory_gradient` does. For `before_step`."""

    def task_row_losses(self) -> list[float]:
        """The mean loss of each row of the current task at the current weights, dropout off; NaN for a row without
        targets. One forward pass over all of them."""

    def memory_loss(self, draw: ReplayTerm) -> float:
        """The loss of a draw from the memory at the current weights, dropout off: one forward pass."""

    def hidden_gradient_norms(self, draw: ReplayTerm) -> list[float]:
        """Norms of the gradient of a draw's loss with regard to each layer's attention outputs, over all tokens: one
        more forward and backward."""

    def perturb(self, kind: str, rho: float) -> None:
        """Move the weights by `rho` along the state `kind`: theta + rho * s / ||s||, the norm over all weights.

        Gradients are then taken there. `restore` puts the old weights back bitwise. A step that begins at moved weights
        takes its gradient there, puts the old ones back, and updates them.
        """

    def restore(self) -> None:
        """Put back the weights from before `perturb`."""

    def dots(self, shards: Sequence[Shard], pairs: Sequence[tuple[Quantity, Quantity]]) -> torch.Tensor:
        """Dot products over all weights of pairs of quantities: fp64 [pairs], by one small all-reduce."""

    def dots_per_tensor(self, shards: Sequence[Shard], pairs: Sequence[tuple[Quantity, Quantity]]) -> torch.Tensor:
        """The same for each trained tensor by itself: fp64 [pairs, tensors], by one all-reduce of as many numbers."""

    def dots_per_row(self, shards: Sequence[Shard], pairs: Sequence[tuple[Quantity, Quantity]]) -> list[torch.Tensor]:
        """The same for each row of each trained tensor, the weights of one output: for each tensor, in the order of
        their numbers, fp64 [pairs, rows]; by one all-reduce of as many numbers. A vector is one row."""

    def parts(self, shards: Sequence[Shard]) -> Iterator[TensorPart]:
        """Yield the parts of trained tensors that lie in these shards. Not a collective call."""

    def tensor_names(self) -> list[str]:
        """Names of the trained tensors, in the order of their numbers."""

    def matrix_names(self) -> list[str]:
        """Names of the trained tensors of two dimensions."""

    def map_matrices(
        self,
        shards: Sequence[Shard],
        names: Sequence[str],
        read: Callable[[TensorPart], torch.Tensor],
        work: Callable[[str, torch.Tensor], torch.Tensor],
        write: Callable[[TensorPart, torch.Tensor], None] | None = None,
    ) -> None:
        """Gather each matrix on one rank and work on it there.

        read: the elements of a part, 1-D. work: gets the name and the whole matrix, fp32 [m, n] on the rank's device,
        and returns one of the same shape; each matrix has one owner, the same in every call with these names. write:
        gets the part's elements of the result, on the shard's device; None where nothing is handed back.
        """

    def layer_similarities(self, draw: ReplayTerm) -> list[float]:
        """The mean cosine of the input and the output of each decoder layer, over the tokens of a draw from the memory
        that predict a supervised one: one forward pass at the current weights."""

    def noise(self, part: TensorPart, key: str) -> torch.Tensor:
        """Independent standard normal values for the elements of a part, fp32, on the shard's device.

        They are a function of the run's seed, the step, `key`, and each element's place in its tensor: the same in
        every ZeRO stage, and again after a resume.
        """

    def correct(
        self,
        num_steps: int,
        draw: ReplayTerm,
        *,
        learning_rate: float | None = None,
        task_share: float = 0.0,
        of_average: bool = False,
        modules: Sequence[str] = (),
    ) -> float:
        """Make optimizer steps on the memory alone, at once, and return the loss of the last one; see
        safecl.training.steps.corrective. modules: patterns of the weights that move; empty for all."""

    def publish(self) -> None:
        """Copy changed master weights into the live model."""

    def log(self, message: str) -> None:
        """Print a line on the console, from rank 0."""
