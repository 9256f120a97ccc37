"""Learning rate as a pure function of the step: linear warm-up, then cosine, linear or constant."""

from __future__ import annotations

import math

from safecl.config import TrainConfig


def learning_rate(train: TrainConfig, step: int, num_steps: int) -> float:
    """Return the learning rate of optimizer step `step` (from 0) of a task with `num_steps` steps. The warm-up rises to
    the peak."""
    warmup = math.ceil(train.warmup_ratio * num_steps)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    shape = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}[
        train.schedule
    ]
    return train.learning_rate * (train.min_learning_rate_ratio + (1.0 - train.min_learning_rate_ratio) * shape)
