"""What a continual-learning method can bring to a run.

A method says, in this order of a step, what it adds: gradients of its own (`before_step`), replay rows and distances to the aligned model
in the one forward pass (`replay_terms`, `task_terms`), changes to the gradient before clipping (`transform_gradient`), a penalty and an
average to the optimizer's pass over the shard (`penalty`, `ema_decay`), and work on the new weights (`after_update`). Around tasks it
prepares its state (`start_task`, `end_task`). Every hook is optional.

A file with a method defines `Config` (a safecl.config.MethodConfig; importing it must not import torch) and `Method`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

from safecl.config import MethodConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from safecl.engine.optimizer import Quantity, Shard


@dataclass(frozen=True)
class ReplayTerm:
    """A draw from the memory and what its tokens are worth: ce_weight * CE + kd_weight * divergence(stored teacher, student).

    Both are means over the draw's supervised tokens of the whole step. Terms of one `stream` see the same rows, other streams draw
    independently.
    """

    stream: str
    ce_weight: float = 0.0
    kd_weight: float = 0.0
    divergence: str = "forward_kl"
    """forward_kl, reverse_kl, jsd, or mse over the stored entries, centred."""


@dataclass(frozen=True)
class TaskTerm:
    """What the task's own rows are worth beside their cross-entropy: weight * distance(teacher, student) on them.

    A mean over the tokens concerned of the whole step. With LoRA the aligned model is the student with its adapters off, in the same step;
    else a teacher's outputs are recorded before training, row by row, in the run folder, or it is asked in every step (`online`).
    """

    name: str
    """Of the term in the metrics: loss/<name>."""
    weight: float
    divergence: str = "forward_kl"
    """forward_kl, reverse_kl, jsd or mse of the outputs at supervised tokens; hidden: mean squared difference of last hidden states."""
    tokens: Literal["all", "supervised"] = "supervised"
    """`hidden` only: which tokens of a row."""
    temperature: float = 1.0
    """Of the compared distributions."""
    k: int = 64
    """Recorded entries per token; 6 bytes each."""
    teacher: str = "aligned"
    """aligned: theta_0; previous: the model that the task before has handed over; ema: the average of the weights; else a model's folder or
    hub id. The last two only `online`."""
    online: bool = False
    """Ask the teacher in every step instead of recording its outputs before."""


@dataclass(frozen=True)
class Penalty:
    """0.5 * strength * sum_i F_i (p_i - a_i)^2 over the trained weights, F from state `fisher` divided by its mean, or 1 without one."""

    strength: float
    anchor: str = "anchor"
    """Kind of state that holds a, one value per weight."""
    fisher: str | None = None
    """Kind of state that holds F."""
    proximal: bool = False
    """Apply it as a proximal step after AdamW: stable for any strength times learning rate."""
    modules: tuple[str, ...] = ()
    """Patterns of parameter names (`*.self_attn.*`) that it is restricted to; all trained weights without any."""
    product: bool = False
    """With LoRA, pull the products (alpha / r) B A to 0, which is the merged weights to their start, instead of the factors. It is then
    part of the loss, and clipped with it."""
    fisher_file: str | None = None
    """With `product`: file of the dense Fisher that weighs the products; without one they are pulled evenly."""


@dataclass(frozen=True)
class AverageMask:
    """Another decay of the average where the Fisher information exceeds a threshold."""

    fisher: str
    """Kind of state that holds F."""
    threshold: float
    decay: float
    """Of elements with F above the threshold."""


C = TypeVar("C", bound=MethodConfig)


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
        """Copies the current weights into the state `kind`; a penalty is exactly 0 right after. `moving`: it will be written to (fp32)."""

    def estimate_fisher(
        self, *, sign_batches: int, rows_per_batch: int, kind: str = "fisher", rows: Literal["memory", "previous_task"] = "memory"
    ) -> float:
        """Estimates the diagonal Fisher on these rows into the state `kind`; returns its mean over all weights."""

    def load_fisher(self, path: str, kind: str = "fisher") -> float:
        """Loads what `safecl fisher` has written into the state `kind`; returns its mean over all weights."""

    def upper_threshold(self, kind: str, share: float) -> float:
        """The smallest value of the state `kind` (not negative) that at most this share of all weights exceeds. Two small all-reduces."""

    def memory_gradient(self, kind: str, stream: str) -> bool:
        """Gradient of the mean cross-entropy of a draw from the memory, at the current weights, into the state `kind`; weights stay.

        One more forward and backward. False where it was not finite; the state then holds nothing of this step.
        """

    def dots(self, shards: list[Shard], pairs: Sequence[tuple[Quantity, Quantity]]) -> torch.Tensor:
        """Dot products over all weights of pairs of quantities, each a function of a shard; fp64 [pairs], by one small all-reduce."""

    def publish(self) -> None:
        """Carries changed master weights into the live model."""

    def log(self, message: str) -> None:
        """A line for the console, from rank 0."""


class Method(Generic[C]):
    """Base of all methods; the hooks do nothing."""

    def __init__(self, name: str, config: C):
        self.name = name
        self.config = config

    def before_step(self, run: Run) -> None:
        """Further gradients, before the step's own; see Run.memory_gradient."""

    def gradient_streams(self) -> list[str]:
        """Streams of draws that `before_step` takes gradients of; their rows are read while the step before computes."""
        return []

    def replay_terms(self) -> list[ReplayTerm]:
        """Draws from the memory that enter every step's forward pass."""
        return []

    def task_terms(self) -> list[TaskTerm]:
        """Distances to a teacher on the task's own rows, in every step's forward pass."""
        return []

    def penalty(self) -> Penalty | None:
        """A quadratic pull of the weights, evaluated inside the optimizer's pass."""
        return None

    def ema_decay(self, run: Run) -> float | None:
        """Decay of the average that follows the weights in this step; None where the method keeps none."""
        return None

    def ema_mask(self) -> AverageMask | None:
        """Elements whose average has another decay than `ema_decay`."""
        return None

    def transform_gradient(self, run: Run, shards: list[Shard]) -> None:
        """Changes shard gradients in place, before the norm is taken and clipped."""

    def after_update(self, run: Run, shards: list[Shard]) -> None:
        """Works on the new weights inside the optimizer's step; what it writes reaches the live model at no extra cost."""

    def start_task(self, run: Run) -> None:
        """Before a task's first step."""

    def end_task(self, run: Run) -> None:
        """After a task's last step."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know of this method: its own attributes, plain numbers, texts and lists.

        What has one value per weight belongs into the shards' state, which is part of every checkpoint, unless its name begins with an
        underscore.
        """
        return {name: value for name, value in vars(self).items() if name not in ("name", "config")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave; `start_task` is not called again for a task that is under way."""
        vars(self).update(state)

    @property
    def saves_average(self) -> bool:
        """True where the saved and evaluated model is the average, not the live weights."""
        return False
