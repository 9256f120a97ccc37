"""The rows of a global step, and the losses that each of them has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from safecl.data import Row
from safecl.engine.model.features import Layers
from safecl.kernels import TopKTeacher
from safecl.methods.terms import TokenConstraint, Tokens
from safecl.replay import TeacherOutputs

HIDDEN = "hidden"
"""The divergence of hidden states; all others compare output distributions."""


@dataclass(frozen=True)
class Question:
    """A request for a teacher's hidden states, or its top-k outputs, at some tokens of a row."""

    form: Literal["hidden", "topk"]
    tokens: Tokens = "supervised"
    """`hidden` only: which tokens of a row."""
    layers: Layers = ()
    """`hidden` only: layers whose hidden states are put side by side; empty: the last."""
    k: int = 0
    temperature: float = 1.0


Answer = torch.Tensor | TopKTeacher
"""Hidden states [tokens, H] in the teacher's dtype, of several layers [tokens, layers * H]; or top-k outputs. On the
device."""


@dataclass(eq=False)
class Asked:
    """A question about one row to an online teacher.

    The answer is set before the step's forward pass, on the rank that computes the row.
    """

    source: str
    question: Question
    given: Answer | None = None

    def answer(self) -> Answer:
        assert self.given is not None, "the teacher answers before the step's forward pass"
        return self.given


@dataclass(frozen=True)
class Distillation:
    """One distance between the teacher and the student on one row."""

    divergence: str
    """Divergence of the output distributions at supervised tokens, or HIDDEN: mean squared difference of hidden
    states."""
    weight: float
    """Weight per token, with the normaliser."""
    temperature: float = 1.0
    token_factors: np.ndarray | None = None
    """fp32 [targets], not for HIDDEN: factors of the tokens' weights; None: 1 for all."""
    term: str | None = None
    """The term of the loss that counts it; None: the row's own."""
    load: Callable[[], TeacherOutputs | Answer] | None = None
    """Returns the teacher's outputs, or hidden states [tokens, H]; None: the outputs that are stored with the row."""
    live: bool = False
    """The teacher is the model with its adapters off, in the same step."""
    tokens: Tokens = "supervised"
    """HIDDEN only: which tokens of the row."""
    layers: Layers = ()
    """HIDDEN only: the layers that are compared; empty: the last."""
    larger: bool = False
    """HIDDEN only: the target is the larger of both values, element by element."""
    asked: Asked | None = None
    """Set where `load` returns the answer of an online teacher."""


@dataclass(eq=False)
class LabelMean:
    """Labels of a step, by token id, and their mean probabilities over its rows. A pass before the step's sets it."""

    ids: tuple[int, ...]
    value: torch.Tensor | None = None  # fp32 [labels]


@dataclass(frozen=True)
class Labels:
    """One row's part in the information over labels, see safecl.methods.terms.LabelTerm."""

    term: str
    weight: float
    """Weight of the row, with the normaliser."""
    sharpen: bool
    mean: LabelMean


@dataclass(frozen=True)
class RowConstraint:
    """A constraint on the tokens of one row."""

    rule: TokenConstraint
    log_probs: np.ndarray  # fp32 [targets], under the aligned model


@dataclass(frozen=True)
class RowNoise:
    """The distance of one row's hidden states to Gaussian noise."""

    weight: float
    """Weight of the row, with the normaliser."""
    seed: int
    """Seed of the noise."""


@dataclass(frozen=True)
class StepRow:
    """One row of a global step. Every rank has the whole list; only the rank that computes a row loads it."""

    term: str
    length: int
    num_targets: int
    load: Callable[[], tuple[Row, TeacherOutputs | None]]
    ce_weight: float = 0.0
    """Weight of the cross-entropy per supervised token, with the normaliser."""
    distillations: tuple[Distillation, ...] = ()
    constraint: RowConstraint | None = None
    token_factors: np.ndarray | None = None
    """fp32 [targets]: factors of the tokens' cross-entropy; None: 1 for all."""
    labels: Labels | None = None
    """Only of rows with a target."""
    every_layer: bool = False
    """The cross-entropy is a mean over the outputs behind the embedding and every layer; equal for all rows of a
    pass."""
    noise: RowNoise | None = None
    """Only of rows with a target."""
    rank: int | None = None
    """The rank that holds the row; None where any rank can read it."""
    key: int | None = None
    """The key of a row of the memory, for the score log; None for other rows."""
    index: int | None = None
    """The place of a task row in its data set, for messages; None for other rows."""

    def weighted(self, term: str, ce_weight: float, distillations: tuple[Distillation, ...] = ()) -> StepRow:
        """Return the same row as part of another term of the loss."""
        return replace(self, term=term, ce_weight=ce_weight, distillations=distillations)


def terms_of(rows: Sequence[StepRow]) -> list[str]:
    """The terms of the loss: first the rows' own in order of appearance, then those of their distances."""
    extra = [d.term for row in rows for d in row.distillations if d.term is not None]
    extra += [row.labels.term for row in rows if row.labels is not None]
    return list(dict.fromkeys([*(row.term for row in rows), *extra]))


def reads_layers(row: StepRow) -> bool:
    """Return whether a term of the row reads hidden states of other layers than the last."""
    return row.noise is not None or any(d.divergence == HIDDEN and d.layers for d in row.distillations)


def count_tokens(tokens: Tokens, lengths: np.ndarray, num_targets: np.ndarray) -> np.ndarray:
    """Return how many tokens of each row have a term, int64 [rows]: known from the index, before a row is read."""
    if tokens == "all":
        return lengths.astype(np.int64)
    if tokens == "last":
        return np.minimum(lengths, 1).astype(np.int64)
    counts = num_targets.astype(np.int64)
    return counts if tokens == "supervised" else np.minimum(counts, tokens)
