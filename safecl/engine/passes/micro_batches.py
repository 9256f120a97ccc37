"""From the rows of a global step to this rank's micro-batches, weights included.

The normaliser: every term of the loss is a mean over that term's supervised tokens of the whole global step. All counts
are known from the length index before the step, so no communication is needed. A token's weight is coefficient * world
size / N_term, because DeepSpeed averages gradients over ranks; micro-batches simply add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from safecl.data import MicroBatch, Row, assign, collate
from safecl.engine.passes.step_rows import HIDDEN, StepRow
from safecl.kernels import TopKTeacher
from safecl.replay import TeacherOutputs


@dataclass
class StepBatch:
    """A micro-batch: keyword arguments of LanguageModel.losses, and which term each target belongs to."""

    inputs: dict
    terms: torch.Tensor  # int64 [n], index into the step's list of terms
    num_tokens: int
    kd_terms: list[torch.Tensor]  # the same for each distillation [n]
    feature_terms: list[torch.Tensor]  # and for each of the features [m]
    row_of: torch.Tensor  # int64 [n], which row of the micro-batch a target belongs to
    keys: list[int | None]  # of the rows, in the memory


@dataclass(frozen=True)
class Layout:
    """How rows become micro-batches on every rank."""

    world_size: int
    tokens_per_microbatch: int
    packed: bool
    pad_id: int = 0


def split_step(rows: Sequence[StepRow], layout: Layout) -> list[list[list[int]]]:
    """[rank][micro-batch][indices into rows]; as many micro-batches on every rank, since each is a collective call."""
    return assign(
        [row.length for row in rows], world_size=layout.world_size, tokens_per_microbatch=layout.tokens_per_microbatch,
        packed=layout.packed, rank_of=[row.rank for row in rows],
    )  # fmt: skip


def micro_batches(rows: Sequence[StepRow], terms: Sequence[str], layout: Layout, rank: int) -> list[StepBatch]:
    """This rank's micro-batches of a global step."""
    live = any(
        d.live for row in rows for d in row.distillations
    )  # a forward pass of its own, so on every rank or on none
    return [_build([rows[index] for index in part], terms, layout, live) for part in split_step(rows, layout)[rank]]


def _build(rows: list[StepRow], terms: Sequence[str], layout: Layout, live: bool) -> StepBatch:
    loaded = [row.load() for row in rows]
    batch = collate([row for row, _ in loaded], packed=layout.packed, pad_id=layout.pad_id)
    places = [target_positions(batch, index, row) for index, (row, _) in enumerate(loaded)]
    positions = np.concatenate(places) if places else np.zeros(0, np.int64)
    counts = [len(place) for place in places]
    ce_weights = np.repeat([row.ce_weight * layout.world_size for row in rows], counts).astype(np.float32)
    term_ids = np.repeat([terms.index(row.term) for row in rows], counts).astype(np.int64)
    distillations, kd_terms = _distillations(rows, [teacher for _, teacher in loaded], counts, terms, layout.world_size)
    features, feature_terms = _features(rows, batch, places, terms, layout.world_size)
    inputs = dict(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        positions=torch.from_numpy(positions),
        targets=batch.targets[torch.from_numpy(positions)],
        ce_weights=torch.from_numpy(ce_weights),
        distillations=distillations,
        features=features,
        reference=live,
    )
    num_tokens = sum(len(row.input_ids) for row, _ in loaded)
    row_of = torch.from_numpy(np.repeat(np.arange(len(rows)), counts))
    return StepBatch(
        inputs, torch.from_numpy(term_ids), num_tokens, kd_terms, feature_terms, row_of, [row.key for row in rows]
    )


def target_positions(batch: MicroBatch, index: int, row: Row) -> np.ndarray:
    """Flat indices whose next token is a supervised target of the row."""
    return batch.starts[index] + np.flatnonzero(row.loss_mask[1:]).astype(np.int64)


def _distillations(
    rows: list[StepRow], stored: list[TeacherOutputs | None], counts: list[int], terms: Sequence[str], world_size: int
) -> tuple[list[dict], list[torch.Tensor]]:
    """One entry per kind of distance between output distributions, over the rows that have it, their teachers' outputs
    stacked."""
    first = np.concatenate([[0], np.cumsum(counts)])
    groups: dict[tuple, list] = {}
    for i, row in enumerate(rows):
        for d in row.distillations:
            if d.divergence != HIDDEN and counts[i]:
                teacher = None if d.live else d.load() if d.load else stored[i]
                k = None if teacher is None else teacher.log_probs.shape[1]
                groups.setdefault((d.divergence, d.temperature, k, d.term), []).append((i, d, teacher))
    result, term_ids = [], []
    for (divergence, temperature, *_), members in sorted(groups.items(), key=lambda item: repr(item[0])):
        lengths = [counts[i] for i, _, _ in members]
        places = np.concatenate([np.arange(first[i], first[i + 1]) for i, _, _ in members])
        weights, ids = np.zeros(first[-1], np.float32), np.zeros(first[-1], np.int64)
        weights[places] = np.repeat([d.weight * world_size for _, d, _ in members], lengths)
        ids[places] = np.repeat([terms.index(d.term or rows[i].term) for i, d, _ in members], lengths)
        entry = dict(
            rows=torch.from_numpy(places),
            kd_weights=torch.from_numpy(weights),
            divergence=divergence,
            temperature=temperature,
        )
        result.append(entry | _stacked([teacher for _, _, teacher in members]))
        term_ids.append(torch.from_numpy(ids))
    return result, term_ids


def _stacked(teachers: list[TeacherOutputs | TopKTeacher | None]) -> dict[str, torch.Tensor]:
    if teachers[0] is None:  # the adapters are switched off instead
        return {}
    return dict(
        log_probs=_stack([teacher.log_probs for teacher in teachers]).float(),
        indices=_stack([teacher.indices for teacher in teachers]).long(),
        log_tail=_stack([teacher.log_tail for teacher in teachers]).float(),
    )


def _features(
    rows: list[StepRow], batch: MicroBatch, places: list[np.ndarray], terms: Sequence[str], world_size: int
) -> tuple[list[dict], list[torch.Tensor]]:
    """Distances between last hidden states: those to recorded ones, and those to the model with its adapters off."""
    groups: dict[bool, list] = {}
    for i, row in enumerate(rows):
        for d in row.distillations:
            if d.divergence == HIDDEN:
                where = batch.starts[i] + np.arange(batch.lengths[i]) if d.all_tokens else places[i]
                groups.setdefault(d.live, []).append((i, d, where))
    result, term_ids = [], []
    for live, members in sorted(groups.items()):
        lengths = [len(where) for _, _, where in members]
        weights = np.repeat([d.weight * world_size for _, d, _ in members], lengths).astype(np.float32)
        entry = dict(
            positions=torch.from_numpy(np.concatenate([where for _, _, where in members])),
            weights=torch.from_numpy(weights),
        )
        result.append(entry if live else entry | {"hidden": torch.cat([d.load() for _, d, _ in members])})
        ids = np.repeat([terms.index(d.term or rows[i].term) for i, d, _ in members], lengths).astype(np.int64)
        term_ids.append(torch.from_numpy(ids))
    return result, term_ids


def _stack(arrays) -> torch.Tensor:
    if isinstance(arrays[0], torch.Tensor):
        return torch.cat(arrays)
    return torch.from_numpy(np.ascontiguousarray(np.concatenate(arrays)))


def to_device(value, device: torch.device):
    """Moves all tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, list):
        return [to_device(item, device) for item in value]
    return value
