"""The form in which teachers are asked in a step: micro-batches with questions in, answers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from safecl.engine.model.attention import Sequences
from safecl.engine.passes.step_rows import Answer, Question


@dataclass
class TeacherBatch:
    """A micro-batch for a teacher, on the CPU."""

    input_ids: torch.Tensor  # int64 [batch, length]
    position_ids: torch.Tensor  # int64 [batch, length]
    asked: list[tuple[Question, torch.Tensor]] = field(default_factory=list)
    """Questions, each with the flat positions that it is about (int64)."""
    sequences: Sequences | None = None
    """The documents, for attention kernels that know them by their bounds."""


class OnlineTeacher(Protocol):
    """A model that answers questions in every step."""

    def answer(self, batches: Sequence[TeacherBatch]) -> list[list[Answer]]:
        """Return the answers of each batch, in the order of its questions."""
