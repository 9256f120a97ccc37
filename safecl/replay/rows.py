"""What one memory row holds: tokens, mask, where it came from, and what the aligned model said about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from safecl.data import Row


@dataclass(frozen=True)
class TeacherOutputs:
    """The k likeliest tokens of the aligned model at each supervised token of a row, and the mass of all the others.

    log_probs: fp16 [targets, k], natural logarithms. indices: int32 [targets, k]. log_tail: fp32 [targets].
    One entry per supervised token in order; temperature and vocabulary stand in the buffer's settings.
    """

    log_probs: np.ndarray
    indices: np.ndarray
    log_tail: np.ndarray


@dataclass(frozen=True)
class MemoryRow:
    """One row of the memory.

    source: the file or data set. task: the task whose behaviour it keeps. step: optimizer step at insertion. tags: e.g. the harm category.
    teacher: outputs of the aligned model, or None. prior_nll: mean NLL of the row's targets under the aligned model, nats; NaN if unknown.
    """

    row: Row
    source: str = ""
    task: str = ""
    step: int = 0
    tags: dict[str, str] = field(default_factory=dict)
    teacher: TeacherOutputs | None = None
    prior_nll: float = float("nan")
