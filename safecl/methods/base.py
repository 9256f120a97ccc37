"""What a continual-learning method can bring to a run.

A method says, in this order of a step, what it adds: gradients of its own (`before_step`), replay rows and distances to
the aligned model in the one forward pass (`replay_terms`, `task_terms`), changes to the gradient before clipping
(`transform_gradient`), a penalty and an average to the optimizer's pass over the shard (`penalty`, `ema_decay`), and
work on the new weights (`after_update`). Around tasks it prepares its state (`start_task`, `end_task`). Every hook is
optional.

A file with a method defines `Config` (a safecl.config.MethodConfig; importing it must not import torch) and `Method`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from safecl.config import MethodConfig
from safecl.methods.context import Run
from safecl.methods.terms import AverageMask, Penalty, ReplayTerm, TaskTerm

if TYPE_CHECKING:
    from safecl.engine.zero.shard import Shard


C = TypeVar("C", bound=MethodConfig)


class Method(Generic[C]):
    """Base of all methods; the hooks do nothing."""

    def __init__(self, name: str, config: C):
        self.name = name
        self.config = config

    def before_step(self, run: Run) -> None:
        """Further gradients, before the step's own; see Run.memory_gradient."""

    def gradient_streams(self) -> list[str]:
        """Streams of draws that `before_step` takes gradients of; their rows are read while the step before
        computes."""
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
        """Works on the new weights inside the optimizer's step; what it writes reaches the live model at no extra
        cost."""

    def start_task(self, run: Run) -> None:
        """Before a task's first step."""

    def end_task(self, run: Run) -> None:
        """After a task's last step."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know of this method: its own attributes, plain numbers, texts and lists.

        What has one value per weight belongs into the shards' state, which is part of every checkpoint, unless its name
        begins with an underscore.
        """
        return {name: value for name, value in vars(self).items() if name not in ("name", "config")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave; `start_task` is not called again for a task that is under way."""
        vars(self).update(state)

    @property
    def saves_average(self) -> bool:
        """True where the saved and evaluated model is the average, not the live weights."""
        return False
