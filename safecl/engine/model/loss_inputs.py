"""Arguments of LanguageModel.losses.

They are plain dictionaries, because they cross the boundary of the wrapped module: a dataclass there crashes ZeRO-3.
"""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor

from safecl.engine.model.attention import Sequences
from safecl.engine.model.features import Layers
from safecl.kernels import SortedRows


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
    hidden: Tensor  # [m, H], or [m, len(layers) * H]: the teacher's


class HiddenDistance(_StoredHidden):
    """Mean squared difference between the teacher's and the student's hidden states.

    Without `hidden` the teacher is the model with its adapters off.
    """

    positions: Tensor  # int64 [m], flat indices into input_ids
    weights: Tensor  # fp32 [m]
    layers: Layers  # empty: the last hidden states
    larger: bool  # the target is the larger of both values, element by element


class Constrained(TypedDict):
    """Factors max(floor, 2 sigmoid(beta (log p0 - log p))) of some targets' cross-entropy weights."""

    rows: Tensor  # int64 [m], indices into LossInputs.positions
    log_probs: Tensor  # fp32 [m], log p0
    betas: Tensor  # fp32 [m]
    floor: float


class LabelInformation(TypedDict):
    """Information over labels at some targets: sum of weights * (sharpen * H(p) + sum_k p_k log mean_k), with p the
    probabilities of the labels alone."""

    rows: Tensor  # int64 [m], indices into LossInputs.positions
    weights: Tensor  # fp32 [m]
    labels: Tensor  # int64 [labels], token ids
    mean: Tensor  # fp32 [labels], the step's mean of p
    sharpen: bool


class NoiseDistance(TypedDict):
    """Distance of some rows' hidden states to Gaussian noise, see safecl.engine.model.features.noise_distances."""

    positions: Tensor  # int64 [sum of counts], flat indices into input_ids
    counts: list[int]  # positions of each row
    seeds: list[int]  # of each row
    weights: Tensor  # fp32 [rows]


class _Optional(TypedDict, total=False):
    sequences: Sequences
    constrained: list[Constrained]
    labels: list[LabelInformation]
    every_layer: bool
    """Whether cross-entropies are means over all layers' outputs; equal on all ranks."""
    each_layer: bool
    """Whether hidden states of layers are read in the step; equal on all ranks and in all micro-batches."""
    noise: NoiseDistance
    sorted_rows: list[SortedRows]
    """The rows of each call of the head, sorted: one call per distance, at least one."""
    sorted_targets: SortedRows
    """The rows of a call of the head that has the targets alone; where there are constraints."""


class LossInputs(_Optional):
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
