"""The distances to teachers in a micro-batch, in groups that are computed together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import numpy as np
import torch

from safecl.data import MicroBatch, Row
from safecl.engine.model.features import Layers
from safecl.engine.model.loss_inputs import HiddenDistance, OutputDistance
from safecl.engine.passes.step_rows import HIDDEN, Distillation, StepRow
from safecl.kernels import TopKTeacher
from safecl.methods.terms import Tokens
from safecl.replay import TeacherOutputs

TopK: TypeAlias = TeacherOutputs | TopKTeacher
"""Top-k outputs, as arrays or as tensors."""


def target_positions(batch: MicroBatch, index: int, row: Row) -> np.ndarray:
    """Flat indices into the batch whose next token is a supervised target of the row; `index` is the row's place."""
    return batch.starts[index] + np.flatnonzero(row.loss_mask[1:]).astype(np.int64)


def token_positions(batch: MicroBatch, index: int, row: Row, tokens: Tokens) -> np.ndarray:
    """Flat indices into the batch of these tokens of the row; `index` is the row's place."""
    return _chosen(tokens, batch, index, target_positions(batch, index, row))


def _chosen(tokens: Tokens, batch: MicroBatch, index: int, targets: np.ndarray) -> np.ndarray:
    """Return the flat positions of these tokens of a row. targets: its target_positions."""
    if tokens == "supervised":
        return targets
    if isinstance(tokens, int):
        return targets[:tokens]
    every = batch.starts[index] + np.arange(batch.lengths[index])
    return every if tokens == "all" else every[-1:]


@dataclass(frozen=True)
class OutputGroup:
    """Distances between output distributions that one call of the head computes."""

    divergence: str
    temperature: float
    num_stored: int | None
    """Stored entries per token; None where the teacher is the model with its adapters off."""
    term: str | None

    def order(self) -> tuple[str, str, str, str]:
        """Sort key. Groups' losses are added in this order, which decides the last bits of a sum: numbers are compared
        as text, as they have been from the start, so that old runs can be repeated."""
        return self.divergence, repr(self.temperature), repr(self.num_stored), repr(self.term)


@dataclass(frozen=True)
class _OutputMember:
    """One row's distance in an OutputGroup."""

    row: int  # in the micro-batch
    distillation: Distillation
    teacher: TopK | None


@dataclass(frozen=True)
class _HiddenMember:
    """One row's distance between hidden states."""

    row: int  # in the micro-batch
    distillation: Distillation
    positions: np.ndarray  # flat indices into the batch


def output_distances(
    rows: Sequence[StepRow],
    stored: Sequence[TeacherOutputs | None],
    counts: Sequence[int],
    terms: Sequence[str],
    world_size: int,
) -> tuple[list[OutputDistance], list[torch.Tensor]]:
    """Return one OutputDistance per group, with its rows' teacher outputs stacked, and the terms of its targets.

    stored: the outputs that are stored with each row. counts: supervised targets of each row, n in total. terms: the
    terms of the step's loss. The terms of a group are int64 [n] indices into it.
    """
    first = np.concatenate([[0], np.cumsum(counts)])
    inputs, term_ids = [], []
    for group, members in sorted(_output_groups(rows, stored, counts).items(), key=lambda item: item[0].order()):
        lengths = [counts[member.row] for member in members]
        places = np.concatenate([np.arange(first[member.row], first[member.row + 1]) for member in members])
        weights, ids = np.zeros(first[-1], np.float32), np.zeros(first[-1], np.int64)
        weights[places] = np.repeat([member.distillation.weight * world_size for member in members], lengths)
        for member in members:
            if (factors := member.distillation.token_factors) is not None:
                weights[first[member.row] : first[member.row + 1]] *= factors
        ids[places] = np.repeat([_term(rows, member, terms) for member in members], lengths)
        distance = OutputDistance(
            rows=torch.from_numpy(places),
            kd_weights=torch.from_numpy(weights),
            divergence=group.divergence,
            temperature=group.temperature,
        )
        if group.num_stored is not None:
            _add_stored(distance, [cast(TopK, member.teacher) for member in members])
        inputs.append(distance)
        term_ids.append(torch.from_numpy(ids))
    return inputs, term_ids


def _output_groups(
    rows: Sequence[StepRow], stored: Sequence[TeacherOutputs | None], counts: Sequence[int]
) -> dict[OutputGroup, list[_OutputMember]]:
    groups: dict[OutputGroup, list[_OutputMember]] = {}
    for index, row in enumerate(rows):
        for d in row.distillations:
            if d.divergence != HIDDEN and counts[index]:
                teacher = None if d.live else cast(TopK, d.load()) if d.load else stored[index]
                num_stored = None if teacher is None else teacher.log_probs.shape[1]
                group = OutputGroup(d.divergence, d.temperature, num_stored, d.term)
                groups.setdefault(group, []).append(_OutputMember(index, d, teacher))
    return groups


def _add_stored(distance: OutputDistance, teachers: Sequence[TopK]) -> None:
    distance["log_probs"] = _stack([teacher.log_probs for teacher in teachers]).float()
    distance["indices"] = _stack([teacher.indices for teacher in teachers]).long()
    distance["log_tail"] = _stack([teacher.log_tail for teacher in teachers]).float()


def hidden_distances(
    rows: Sequence[StepRow],
    batch: MicroBatch,
    places: Sequence[np.ndarray],
    terms: Sequence[str],
    world_size: int,
) -> tuple[list[HiddenDistance], list[torch.Tensor]]:
    """Return one HiddenDistance per set of layers, teacher and target: first those to given hidden states, then those
    to the model with its adapters off.

    places: target_positions of each row. terms: the terms of the step's loss. The terms of a distance's m positions are
    int64 [m] indices into it.
    """
    found = [
        _HiddenMember(index, d, _chosen(d.tokens, batch, index, places[index]))
        for index, row in enumerate(rows)
        for d in row.distillations
        if d.divergence == HIDDEN
    ]
    inputs, term_ids = [], []
    for group in sorted({_hidden_group(member) for member in found}):
        live, layers, larger = group
        members = [member for member in found if _hidden_group(member) == group]
        lengths = [len(member.positions) for member in members]
        weights = np.repeat([member.distillation.weight * world_size for member in members], lengths)
        distance = HiddenDistance(
            positions=torch.from_numpy(np.concatenate([member.positions for member in members])),
            weights=torch.from_numpy(weights.astype(np.float32)),
            layers=layers,
            larger=larger,
        )
        if not live:
            distance["hidden"] = torch.cat([_hidden_states(member.distillation) for member in members])
        inputs.append(distance)
        ids = np.repeat([_term(rows, member, terms) for member in members], lengths).astype(np.int64)
        term_ids.append(torch.from_numpy(ids))
    return inputs, term_ids


def _hidden_group(member: _HiddenMember) -> tuple[bool, Layers, bool]:
    return member.distillation.live, member.distillation.layers, member.distillation.larger


def _hidden_states(distillation: Distillation) -> torch.Tensor:
    assert distillation.load is not None, "hidden states are not stored with rows"
    return cast(torch.Tensor, distillation.load())


def _term(rows: Sequence[StepRow], member: _OutputMember | _HiddenMember, terms: Sequence[str]) -> int:
    return terms.index(member.distillation.term or rows[member.row].term)


def _stack(parts: Sequence[np.ndarray | torch.Tensor]) -> torch.Tensor:
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(cast(list[torch.Tensor], list(parts)))
    return torch.from_numpy(np.ascontiguousarray(np.concatenate(cast(list[np.ndarray], list(parts)))))
