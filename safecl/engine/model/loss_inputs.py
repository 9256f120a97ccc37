"""Arguments of LanguageModel.losses.

They are plain dictionaries, because they cross the boundary of the wrapped module: a dataclass there crashes ZeRO-3.
"""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor

from safecl.engine.model.attention import Sequences


class _StoredOutputs(TypedDict, total=False):
    log_probs: Tensor  # fp32 [m, k]
    indices: Tensor  # int64 [m, k]
    log_tail: Tensor  # fp32 [m]


class OutputDistance(_StoredOutputs):
    """A distance between the teacher's and the student's output distributions.

    The teacher is given by its stored top-k outputs. Without them it is the model with its adapters off.
    """

    rows: Tensor  # int64 [m], indices into LossInputs.positions that have a teacher
    kd_weights: Tensor  # fp32 [n], 0 where there is no teacher
    divergence: str
    temperature: float


class _StoredHidden(TypedDict, total=False):
    hidden: Tensor  # [m, H], the teacher's


class HiddenDistance(_StoredHidden):
    """Mean squared difference between the teacher's and the student's last hidden states.

    Without `hidden` the teacher is the model with its adapters off.
    """

    positions: Tensor  # int64 [m], flat indices into input_ids
    weights: Tensor  # fp32 [m]


class _Documents(TypedDict, total=False):
    sequences: Sequences


class LossInputs(_Documents):
    """One micro-batch with n supervised targets. All weights hold their term's normaliser."""

    input_ids: Tensor  # int64 [batch, length]
    position_ids: Tensor  # int64 [batch, length]
    positions: Tensor  # int64 [n], flat indices into input_ids whose next token is a target
    targets: Tensor  # int64 [n]
    ce_weights: Tensor  # fp32 [n]
    distillations: list[OutputDistance]
    features: list[HiddenDistance]
    reference: bool
    """Whether a forward pass with the adapters off is needed; equal on all ranks, since it is a collective call."""
