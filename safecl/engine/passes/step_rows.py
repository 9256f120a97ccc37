"""The rows of a global step and what is asked of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from safecl.data import Row
from safecl.kernels import TopKTeacher
from safecl.replay import TeacherOutputs

HIDDEN = "hidden"


@dataclass(frozen=True)
class Question:
    """What is asked of a teacher about some tokens: their last hidden states, or the k likeliest next tokens and the
    mass of the others."""

    form: Literal["hidden", "topk"]
    all_tokens: bool = False
    """`hidden`: every token of a row, not only those that predict a supervised target."""
    k: int = 0
    temperature: float = 1.0


Answer = torch.Tensor | TopKTeacher
"""Hidden states [tokens, H] in the teacher's dtype, or top-k outputs; on the device."""


@dataclass(eq=False)
class Asked:
    """A question about one row to an online teacher, and its answer once the teacher was there, on the rank that
    computes the row."""

    source: str
    question: Question
    said: Answer | None = None

    def answer(self) -> Answer:
        assert self.said is not None, "the teacher is asked before the step's forward pass"
        return self.said


@dataclass(frozen=True)
class Distillation:
    """How far the student may be from a teacher on one row: weight per token, the normaliser included, and distance."""

    divergence: str  # of output distributions at the supervised tokens, or "hidden": mean squared difference of last hidden states
    weight: float
    temperature: float = 1.0
    term: str | None = None  # term of the loss that it is counted in; None: the row's own
    load: Callable[[], TeacherOutputs | Answer] | None = (
        None  # outputs or hidden states [tokens, H]; None: the row's own
    )
    live: bool = False  # the teacher is the model with its adapters off, in the same step
    all_tokens: bool = False  # hidden only: every token of the row, not only the supervised ones
    asked: Asked | None = None  # what `load` gives is asked of an online teacher before the step


@dataclass(frozen=True)
class StepRow:
    """One row of a global step. Every rank knows all of them; only the rank that computes a row loads it."""

    term: str
    length: int
    num_targets: int
    load: Callable[[], tuple[Row, TeacherOutputs | None]]
    ce_weight: float = 0.0  # per supervised token, normaliser included
    distillations: tuple[Distillation, ...] = ()
    rank: int | None = None  # the rank that holds it; None where any rank can read it
    key: int | None = None  # in the memory, where its loss is logged

    def weighted(self, term: str, ce_weight: float, distillations: tuple[Distillation, ...] = ()) -> StepRow:
        """The same row as part of another term of the loss."""
        return replace(self, term=term, ce_weight=ce_weight, distillations=distillations)


def terms_of(rows: Sequence[StepRow]) -> list[str]:
    """The terms of the loss that the rows belong to: those of their cross-entropy in order of appearance, then those of
    their distances."""
    extra = [d.term for row in rows for d in row.distillations if d.term is not None]
    return list(dict.fromkeys([*(row.term for row in rows), *extra]))
