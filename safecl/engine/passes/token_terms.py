"""Constraints on the tokens of a micro-batch, information over labels at its rows' first targets, and distances of
its rows' hidden states to noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from safecl.data import Row
from safecl.engine.model.loss_inputs import Constrained, LabelInformation, NoiseDistance
from safecl.engine.passes.step_rows import LabelMean, StepRow
from safecl.methods.terms import TokenConstraint


def constraints(rows: Sequence[StepRow], loaded: Sequence[Row], counts: Sequence[int]) -> list[Constrained]:
    """Return the constraints on the targets of these rows, one per rule."""
    first = np.concatenate([[0], np.cumsum(counts)])
    members: dict[TokenConstraint, list[int]] = {}
    for index, row in enumerate(rows):
        if row.constraint is not None and counts[index]:
            members.setdefault(row.constraint.rule, []).append(index)
    found = []
    for rule, own in members.items():
        given = [constraint.log_probs for i in own if (constraint := rows[i].constraint) is not None]
        found.append(
            Constrained(
                rows=torch.from_numpy(np.concatenate([np.arange(first[i], first[i + 1]) for i in own])),
                log_probs=torch.from_numpy(np.concatenate(given)),
                betas=torch.from_numpy(np.concatenate([betas_of(rule, loaded[i].loss_mask) for i in own])),
                floor=rule.floor,
            )
        )
    return found


def betas_of(rule: TokenConstraint, loss_mask: np.ndarray) -> np.ndarray:
    """Return the rule's beta of every supervised token, fp32 [targets], by its place in its answer.

    loss_mask: bool [length] of the row, False at 0.
    """
    targets = np.flatnonzero(loss_mask)
    places = np.arange(len(targets))
    begins = np.where(np.diff(targets, prepend=-2) > 1, places, 0)
    table = np.array([*rule.first_betas, rule.beta], np.float32)
    return table[np.minimum(places - np.maximum.accumulate(begins), len(rule.first_betas))]


def label_information(
    rows: Sequence[StepRow], counts: Sequence[int], terms: Sequence[str], world_size: int
) -> tuple[list[LabelInformation], list[torch.Tensor]]:
    """Return the information over labels in a micro-batch, one entry per term of the loss, and the term of each row.

    counts: supervised targets of each row. terms: the terms of the step's loss; int64 [m] indices into it.
    """
    first = np.concatenate([[0], np.cumsum(counts)])
    members: dict[LabelMean, list[int]] = {}
    for index, row in enumerate(rows):
        if row.labels is not None:
            members.setdefault(row.labels.mean, []).append(index)
    inputs, term_ids = [], []
    for mean, own in members.items():
        assert mean.value is not None, "the means are computed before the step's pass"
        labels = [found for index in own if (found := rows[index].labels) is not None]
        weights = np.array([found.weight * world_size for found in labels], np.float32)
        inputs.append(
            LabelInformation(
                rows=torch.from_numpy(first[own]),
                weights=torch.from_numpy(weights),
                labels=torch.tensor(mean.ids),
                mean=mean.value,
                sharpen=labels[0].sharpen,
            )
        )
        term_ids.append(torch.tensor([terms.index(found.term) for found in labels]))
    return inputs, term_ids


def noise_distance(
    rows: Sequence[StepRow], places: Sequence[np.ndarray], terms: Sequence[str], world_size: int
) -> tuple[NoiseDistance | None, torch.Tensor]:
    """Return the distances to noise in a micro-batch, None without any, and the term of each of their rows.

    places: target_positions of each row. terms: the terms of the step's loss; int64 [rows] indices into it.
    """
    own = [index for index, row in enumerate(rows) if row.noise is not None]
    if not own:
        return None, torch.zeros(0, dtype=torch.int64)
    noises = [noise for index in own if (noise := rows[index].noise) is not None]
    distance = NoiseDistance(
        positions=torch.from_numpy(np.concatenate([places[index] for index in own])),
        counts=[len(places[index]) for index in own],
        seeds=[noise.seed for noise in noises],
        weights=torch.tensor([noise.weight * world_size for noise in noises], dtype=torch.float32),
    )
    return distance, torch.tensor([terms.index(rows[index].term) for index in own])
