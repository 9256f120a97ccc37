"""Learning rate as a pure function of the step.

cosine, linear and constant begin every task with a linear warm-up: in a sequence the rate is warmed and decayed again
(Ibrahim et al. 2024, arXiv 2403.08763, section 7.1). `infinite` (section 7.4 there) warms up in the first task only:

    first task    warm-up to the peak, cosine cool-down to the constant rate until COOLED of the steps, constant
    later tasks   constant from the start
    every task    from ANNEALING of the steps on exponentially down to the smallest rate

so a new task begins at a moderate rate, without the loss that a new warm-up brings.
"""

from __future__ import annotations

import math

from safecl.config import TrainConfig

COOLED, ANNEALING = 0.6, 0.85
SMALLEST = 0.01
"""End of the annealing, as a share of the peak, where min_learning_rate_ratio is 0."""


def learning_rate(train: TrainConfig, step: int, num_steps: int, *, is_first: bool = True) -> float:
    """Return the learning rate of optimizer step `step` (from 0) of a task with `num_steps` steps.

    is_first: the task is the run's first. The warm-up rises to the peak.
    """
    if train.schedule == "infinite":
        return train.learning_rate * _infinite(train, step, num_steps, is_first)
    warmup = math.ceil(train.warmup_ratio * num_steps)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    shape = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}[
        train.schedule
    ]
    return train.learning_rate * (train.min_learning_rate_ratio + (1.0 - train.min_learning_rate_ratio) * shape)


def _infinite(train: TrainConfig, step: int, num_steps: int, is_first: bool) -> float:
    """Return the rate of the infinite schedule as a share of the peak."""
    warmup, cooled = math.ceil(train.warmup_ratio * num_steps), math.ceil(COOLED * num_steps)
    annealing, steady = math.ceil(ANNEALING * num_steps), train.constant_ratio
    if step >= annealing:
        last = max(train.min_learning_rate_ratio, SMALLEST)
        return steady * (last / steady) ** ((step + 1 - annealing) / (num_steps - annealing))
    if not is_first:
        return steady
    if step < warmup:
        return (step + 1) / warmup
    if step < cooled:
        progress = (step - warmup) / max(1, cooled - warmup)
        return steady + (1.0 - steady) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return steady
