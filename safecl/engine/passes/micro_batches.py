"""Split the rows of a global step into micro-batches for every rank.

The normaliser: every term of the loss is a mean over that term's supervised tokens of the whole global step. The
length index gives all counts before the step, so no communication is needed. A token's weight is coefficient * world
size / N_term, because DeepSpeed averages gradients over ranks. The losses of micro-batches are added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch

from safecl.data import MicroBatch, assign, collate
from safecl.engine.model.attention import Sequences
from safecl.engine.model.loss_inputs import LossInputs, OutputDistance
from safecl.engine.passes.distances import hidden_distances, output_distances, target_positions
from safecl.engine.passes.step_rows import StepRow, reads_layers
from safecl.engine.passes.token_terms import constraints, label_information, noise_distance
from safecl.kernels import SortedRows, sort_rows

T = TypeVar("T")


@dataclass
class StepBatch:
    """A micro-batch with n supervised targets, and how its losses are counted."""

    inputs: LossInputs
    terms: torch.Tensor
    """int64 [n], the term of the loss that each target belongs to, an index into the step's list of terms."""
    num_tokens: int
    kd_terms: list[torch.Tensor]
    """The terms of each of `inputs["distillations"]`, int64 [n]."""
    feature_terms: list[torch.Tensor]
    """The terms of each of `inputs["features"]`, int64 [m]."""
    label_terms: list[torch.Tensor]
    """The terms of each of `inputs["labels"]`, int64 [m]."""
    noise_terms: torch.Tensor
    """The terms of the rows of `inputs["noise"]`, int64 [rows]."""
    row_of: torch.Tensor
    """int64 [n], the row of the micro-batch that each target belongs to."""
    row_counts: torch.Tensor
    """int64 [rows], the supervised targets of each row."""
    keys: list[int | None]
    """The rows' keys in the memory."""
    replayed: torch.Tensor | None
    """int64, the rows that have a key; None where none has."""
    indices: list[int | None]
    """The places in the task's data set of task rows that have a weight; None for other rows."""


@dataclass(frozen=True)
class MicroBatchLayout:
    """The size and form of micro-batches, equal on every rank."""

    world_size: int
    tokens_per_microbatch: int
    packed: bool
    pad_id: int = 0
    vocab_size: int = 2**31 - 1
    """Width of the logits; targets and teachers' tokens beyond it are refused."""


def split_step(rows: Sequence[StepRow], layout: MicroBatchLayout) -> list[list[list[int]]]:
    """Return [rank][micro-batch][indices into rows].

    Every rank gets the same number of micro-batches, since each is a collective call.
    """
    return assign(
        [row.length for row in rows],
        world_size=layout.world_size,
        tokens_per_microbatch=layout.tokens_per_microbatch,
        packed=layout.packed,
        rank_of=[row.rank for row in rows],
    )


def micro_batches(
    rows: Sequence[StepRow], terms: Sequence[str], layout: MicroBatchLayout, rank: int
) -> list[StepBatch]:
    """Load this rank's rows of a global step and return its micro-batches."""
    # The pass with the adapters off is a collective call, so all ranks make it or none.
    reference = any(d.live for row in rows for d in row.distillations)
    parts = split_step(rows, layout)[rank]
    batches = [_build([rows[index] for index in part], terms, layout, reference) for part in parts]
    every_layer = any(row.every_layer for row in rows)
    if every_layer or any(reads_layers(row) for row in rows):
        for batch in batches:
            batch.inputs["each_layer"], batch.inputs["every_layer"] = True, every_layer
    return batches


def _build(rows: list[StepRow], terms: Sequence[str], layout: MicroBatchLayout, reference: bool) -> StepBatch:
    loaded = [row.load() for row in rows]
    batch = collate([row for row, _ in loaded], packed=layout.packed, pad_id=layout.pad_id)
    places = [target_positions(batch, index, row) for index, (row, _) in enumerate(loaded)]
    positions = torch.from_numpy(np.concatenate(places) if places else np.zeros(0, np.int64))
    counts = [len(place) for place in places]
    ce_weights = np.repeat([row.ce_weight * layout.world_size for row in rows], counts).astype(np.float32)
    for first, row, count in zip(np.cumsum([0, *counts]), rows, counts, strict=False):
        if row.token_factors is not None:
            ce_weights[first : first + count] *= row.token_factors
    term_ids = np.repeat([terms.index(row.term) for row in rows], counts).astype(np.int64)
    stored = [teacher for _, teacher in loaded]
    distillations, kd_terms = output_distances(rows, stored, counts, terms, layout.world_size)
    features, feature_terms = hidden_distances(rows, batch, places, terms, layout.world_size)
    labels, label_terms = label_information(rows, counts, terms, layout.world_size)
    noise, noise_terms = noise_distance(rows, places, terms, layout.world_size)
    inputs = LossInputs(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        positions=positions,
        targets=batch.targets[positions],
        ce_weights=torch.from_numpy(ce_weights),
        distillations=distillations,
        features=features,
        reference=reference,
        sequences=sequences_of(batch, layout.packed),
    )
    inputs["sorted_rows"] = _sorted_rows(inputs, layout.vocab_size)
    if constrained := constraints(rows, [row for row, _ in loaded], counts):
        inputs["constrained"] = constrained
        ones = torch.ones_like(inputs["ce_weights"])
        inputs["sorted_targets"] = sort_rows(
            len(ones), vocab=layout.vocab_size, labels=inputs["targets"], ce_weights=ones
        )
    if labels:
        inputs["labels"] = labels
    if noise is not None:
        inputs["noise"] = noise
    replayed = [number for number, row in enumerate(rows) if row.key is not None]
    return StepBatch(
        inputs,
        terms=torch.from_numpy(term_ids),
        num_tokens=sum(len(row.input_ids) for row, _ in loaded),
        kd_terms=kd_terms,
        feature_terms=feature_terms,
        label_terms=label_terms,
        noise_terms=noise_terms,
        row_of=torch.from_numpy(np.repeat(np.arange(len(rows)), counts)),
        row_counts=torch.tensor(counts, dtype=torch.int64),
        keys=[row.key for row in rows],
        replayed=torch.tensor(replayed) if replayed else None,
        indices=[row.index if row.ce_weight > 0 and row.num_targets else None for row in rows],
    )


def _sorted_rows(inputs: LossInputs, vocab: int) -> list[SortedRows]:
    """Sort the rows of each call of the head here, where nobody waits for the answer; see LanguageModel.losses."""
    first, *others = inputs["distillations"] or (None,)
    own: dict[str, Any] = {"labels": inputs["targets"], "ce_weights": inputs["ce_weights"]}
    calls = [own | _teacher_of(first), *map(_teacher_of, others)]
    return [sort_rows(len(inputs["targets"]), vocab=vocab, **call) for call in calls]


def _teacher_of(distance: OutputDistance | None) -> dict[str, Any]:
    if distance is None:
        return {}
    found = {"teacher_rows": distance["rows"], "kd_weights": distance["kd_weights"]}
    is_stored = "indices" in distance and distance["indices"].device.type == "cpu"
    # Tokens on the device are those that a teacher of this run has just computed.
    return found | ({"indices": distance["indices"]} if is_stored else {})


def sequences_of(batch: MicroBatch, packed: bool) -> Sequences:
    """Return where the micro-batch's documents begin."""
    bounds = batch.bounds
    return Sequences(cu_seqlens=bounds, max_length=int(bounds.diff().max()), packed=packed)


def to_device(value: T, device: torch.device) -> T:
    """Return the value with all tensors in nested dicts and lists on the device."""
    return cast(T, _moved(value, device))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, device) for item in value]
    return value
