"""The base class of continual-learning methods, and the types of its hooks.

The hooks, in the order of a step:

    memory_step                   a draw from the memory in the place of the task's rows
    before_step                   gradients of the method's own, weights moved for the step's gradient
    hidden_move                   hidden states moved in the forward pass
    replay_terms, task_terms      replay rows and distances to a teacher, in the one forward pass
    label_terms                   information over labels on the replay rows
    prompt_terms                  prompts of the memory whose hidden state is kept, in the same pass
    row_factors, token_factors    weights of the task's rows and tokens, from scores that were computed before training
    distance_factors              the same of the distances in task_terms
    learned_factors               weights of the task's rows that follow their losses
    token_constraint              weights of the task's tokens that follow their probabilities
    transform_gradient            changes to the gradient before clipping
    learning_rate_factor          a factor of the step's learning rate
    penalty, ema_decay, ema_mask  a pull and an average, inside the optimizer's pass over the shard
    transform_step                changes to the step that AdamW has taken
    after_update                  work on the new weights
    see_row_losses                the losses of the task's rows in the step
    after_step                    further passes at the new weights

Around tasks, start_task and end_task prepare and finish the method's state. Every hook is optional.

A file with a method defines `Config` (a safecl.config.MethodConfig; importing it must not import torch) and `Method`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from safecl.config import MethodConfig
from safecl.methods.context import Quantity, Run, Shard, TensorPart
from safecl.methods.terms import (
    AverageMask,
    HiddenMove,
    LabelTerm,
    Penalty,
    PromptTerm,
    ReplayTerm,
    Score,
    TaskTerm,
    TokenConstraint,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = [
    "BEFORE",
    "AverageMask",
    "HiddenMove",
    "LabelTerm",
    "Method",
    "Penalty",
    "PromptTerm",
    "Quantity",
    "ReplayTerm",
    "Run",
    "Score",
    "Shard",
    "TaskTerm",
    "TensorPart",
    "TokenConstraint",
    "one_of",
    "step_of",
]

BEFORE = "_before_step"
"""State that holds the weights from before the step, in `transform_step`."""


def step_of(shard: Shard) -> torch.Tensor:
    """The step that was taken, in `transform_step`: a Quantity for dot products."""
    return shard.param - shard.state[BEFORE]


def one_of(shard: Shard) -> torch.Tensor:
    """Ones in the layout of the shard: a Quantity whose dot product with another one is that one's sum."""
    return shard.param.new_ones(()).expand_as(shard.param)


C = TypeVar("C", bound=MethodConfig)


class Method(Generic[C]):
    """Base of all methods; the hooks do nothing."""

    def __init__(self, name: str, config: C):
        self.name = name
        self.config = config

    def memory_step(self, step: int, num_steps: int) -> ReplayTerm | None:
        """The draw from the memory that step `step` of a task of `num_steps` trains in the place of the task's rows;
        None for an ordinary step. It depends on nothing else: rows are read one step ahead."""
        return None

    def before_step(self, run: Run) -> None:
        """Take further gradients before the step's own; see Run.memory_gradient and Run.perturb."""

    def hidden_move(self) -> HiddenMove | None:
        """Hidden states that are moved along their own gradient in the step's forward pass: one more pass before it."""
        return None

    def gradient_draws(self, step: int) -> list[ReplayTerm]:
        """Draws from the memory whose gradients or losses the method takes by itself in step `step`; the run reads
        their rows one step ahead."""
        return []

    def replay_terms(self) -> list[ReplayTerm]:
        """Draws from the memory that enter every step's forward pass."""
        return []

    def task_terms(self) -> list[TaskTerm]:
        """Distances to a teacher on the task's own rows, in every step's forward pass."""
        return []

    def label_terms(self) -> list[LabelTerm]:
        """Information over labels on replayed rows; costs a forward pass of these rows in every step."""
        return []

    def prompt_terms(self) -> list[PromptTerm]:
        """Prompts of the memory whose hidden state is kept, in every step's forward pass."""
        return []

    def scores(self) -> list[Score]:
        """Scores of the task's rows that `row_factors` and `token_constraint` read."""
        return []

    def see_scores(self, scores: Mapping[str, Sequence[np.ndarray]]) -> None:
        """Look at the scores of all rows of a task before its first step: by name, for each row fp32 [tokens]."""

    def row_factors(self, scores: Mapping[str, Sequence[np.ndarray]]) -> np.ndarray | None:
        """Factors of the cross-entropy of a step's task rows, fp64 [rows], at least 0; None: 1 for all.

        scores: by name, for each row fp32 [tokens]. All rows of the global step, the same on every rank. The loss
        remains a mean: the factors are divided by their own mean (safecl/planning/loss_mean.py).
        """
        return None

    def token_factors(self, scores: Mapping[str, Sequence[np.ndarray]]) -> list[np.ndarray] | None:
        """Factors of the cross-entropy of each supervised token of a step's task rows, fp32 [tokens] each, at least 0;
        None: 1 for all. The mean over the step is the one that train.loss_mean names, with the sum of a row's factors
        as its number of tokens."""
        return None

    factors_count: ClassVar[bool] = True
    """False where the mean is over all supervised tokens, whatever their `token_factors` are."""

    def distance_factors(self, scores: Mapping[str, Sequence[np.ndarray]]) -> list[np.ndarray] | None:
        """Factors of the method's own `task_terms` that are `shaped` on each supervised token of a step's task rows,
        fp32 [tokens] each, at least 0; None: 1 for all."""
        return None

    def learned_factors(self, step: int, rows: Sequence[int]) -> np.ndarray | None:
        """Factors of a step's task rows that follow the losses of earlier steps, fp64 [rows]; None: 1 for all.

        rows: places in the task's data set. The rows of a step are read one step ahead, so losses of the steps up to
        `step` - 2 are known. Only where `Config.follows_row_losses`.
        """
        return None

    def see_row_losses(self, step: int, losses: Mapping[int, float]) -> None:
        """Take note of the mean losses of a step's task rows, by place in the data set, after the step: all rows of the
        global step, the same on every rank. Only where `Config.follows_row_losses`."""

    def token_constraint(self) -> TokenConstraint | None:
        """Factors of the task's tokens that depend on their current probability."""
        return None

    def penalty(self) -> Penalty | None:
        """A quadratic pull of the weights, evaluated inside the optimizer's pass."""
        return None

    def learning_rate_factor(self, run: Run) -> float:
        """Factor of the learning rate in this step."""
        return 1.0

    def ema_decay(self, run: Run) -> float | None:
        """Decay of the average that follows the weights in this step; None where the method keeps none."""
        return None

    def ema_mask(self) -> AverageMask | None:
        """Elements whose average has another decay than `ema_decay`; None where all have the same."""
        return None

    def transform_gradient(self, run: Run, shards: Sequence[Shard]) -> None:
        """Change the shards' gradients in place, before their norm is taken and clipped."""

    def transform_step(self, run: Run, shards: Sequence[Shard]) -> None:
        """Change the step in place, after AdamW has taken it: `param` holds the new weights, the state BEFORE the old
        ones. An average follows what is left of the step.

        The old weights are kept where a method has this hook: 4 bytes per weight, declared in `Config.state_kinds`.
        """

    def after_update(self, run: Run, shards: Sequence[Shard]) -> None:
        """Work on the new weights inside the optimizer's step; changes reach the live model at no extra cost."""

    def acts_after_update(self, run: Run) -> bool:
        """False where `after_update` would do nothing in this step. An average in host memory then follows the weights
        while the next pass computes, not inside the step."""
        return True

    def after_step(self, run: Run) -> None:
        """Make further passes at the new weights, after the step; not called where the step was skipped."""

    def start_task(self, run: Run) -> None:
        """Prepare the method's state before a task's first step."""

    def end_task(self, run: Run) -> None:
        """Finish a task after its last step."""

    def state_dict(self) -> dict[str, Any]:
        """The attributes that a resumed run needs: plain numbers, texts and lists.

        State with one value per weight belongs in the shards, whose state is part of every checkpoint unless the name
        of its kind begins with an underscore.
        """
        return {name: value for name, value in vars(self).items() if name not in ("name", "config")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; `start_task` is not called again for the task that is resumed."""
        vars(self).update(state)

    @property
    def saves_average(self) -> bool:
        """True where the saved and evaluated model is the average, not the live weights."""
        return self.config.keeps_average
