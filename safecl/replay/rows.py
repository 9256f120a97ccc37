"""A memory row: its tokens and mask, where it came from, and the aligned model's outputs on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from safecl.data import Row


class ReplayError(RuntimeError):
    """The memory on disk cannot be read or written. The message names the file, what is wrong, and what is still good.
    Exit code 1."""


@dataclass(frozen=True)
class TeacherOutputs:
    """The k likeliest tokens of the aligned model at each supervised token of a row, and the mass of all others.

    log_probs: fp16 [targets, k], natural logarithms. indices: int32 [targets, k]. log_tail: fp32 [targets], never
    derived as 1 - sum. One entry per supervised token, in order; temperature and vocabulary are those of the memory.
    """

    log_probs: np.ndarray
    indices: np.ndarray
    log_tail: np.ndarray


@dataclass(frozen=True)
class MemoryRow:
    """One row of the memory.

    row: token ids and mask. source: the file or data set. task: the task whose behaviour it keeps. step: optimizer step
    at insertion. tags: e.g. the harm category. teacher: outputs of the aligned model, or None.
    prior_nll: mean NLL of the row's targets under the aligned model, nats per token; NaN where unknown (then estimated
    from `teacher`).
    """

    row: Row
    source: str = ""
    task: str = ""
    step: int = 0
    tags: Mapping[str, str] = field(default_factory=dict)
    teacher: TeacherOutputs | None = None
    prior_nll: float = float("nan")
