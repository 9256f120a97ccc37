"""From the rows of a global step to this rank's micro-batches, weights included.

The normaliser: every term of the loss is a mean over that term's supervised tokens of the whole global step. All counts are known from the
length index before the step, so no communication is needed. A token's weight is coefficient * world size / N_term, because DeepSpeed
averages gradients over ranks; micro-batches simply add up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from safecl.data import MicroBatch, Row, assign, collate
from safecl.replay import TeacherOutputs

IGNORE = -100


@dataclass(frozen=True)
class Distillation:
    """How far the student may be from a row's stored teacher: weight per supervised token and divergence."""

    divergence: str
    weight: float


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

    def weighted(self, term: str, ce_weight: float, distillations: tuple[Distillation, ...] = ()) -> StepRow:
        """The same row as part of another term of the loss."""
        return replace(self, term=term, ce_weight=ce_weight, distillations=distillations)


@dataclass
class StepBatch:
    """A micro-batch: keyword arguments of LanguageModel.losses, and which term each target belongs to."""

    inputs: dict
    terms: torch.Tensor  # int64 [n], index into the step's list of terms
    num_tokens: int


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


def micro_batches(rows: Sequence[StepRow], terms: Sequence[str], layout: Layout, rank: int, temperature: float = 1.0) -> list[StepBatch]:
    """This rank's micro-batches of a global step. `temperature` is that of the stored teacher outputs."""
    parts = split_step(rows, layout)[rank]
    return [_build([rows[index] for index in part], terms, layout, temperature) for part in parts]


def _build(rows: list[StepRow], terms: Sequence[str], layout: Layout, temperature: float) -> StepBatch:
    loaded = [row.load() for row in rows]
    batch = collate([row for row, _ in loaded], packed=layout.packed, pad_id=layout.pad_id)
    places = [_target_positions(batch, index, row) for index, (row, _) in enumerate(loaded)]
    positions = np.concatenate(places) if places else np.zeros(0, np.int64)
    counts = [len(place) for place in places]
    ce_weights = np.repeat([row.ce_weight * layout.world_size for row in rows], counts).astype(np.float32)
    term_ids = np.repeat([terms.index(row.term) for row in rows], counts).astype(np.int64)
    inputs = dict(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        positions=torch.from_numpy(positions),
        targets=batch.targets[torch.from_numpy(positions)],
        ce_weights=torch.from_numpy(ce_weights),
        distillations=_distillations(rows, [teacher for _, teacher in loaded], counts, layout.world_size, temperature),
    )
    return StepBatch(inputs, torch.from_numpy(term_ids), sum(len(row.input_ids) for row, _ in loaded))


def _target_positions(batch: MicroBatch, index: int, row: Row) -> np.ndarray:
    """Flat indices whose next token is a supervised target of the row."""
    return batch.starts[index] + np.flatnonzero(row.loss_mask[1:]).astype(np.int64)


def _distillations(rows, teachers, counts: list[int], world_size: int, temperature: float) -> list[dict]:
    """One entry per divergence, over the rows that have it, their stored outputs stacked."""
    first = np.concatenate([[0], np.cumsum(counts)])
    result = []
    for divergence in sorted({d.divergence for row in rows for d in row.distillations}):
        chosen = [(i, d.weight) for i, row in enumerate(rows) for d in row.distillations if d.divergence == divergence]
        chosen = [(i, weight) for i, weight in chosen if counts[i]]
        if not chosen:
            continue
        indices = np.concatenate([np.arange(first[i], first[i + 1]) for i, _ in chosen])
        weights = np.zeros(first[-1], np.float32)
        weights[indices] = np.repeat([weight * world_size for _, weight in chosen], [counts[i] for i, _ in chosen])
        result.append(
            dict(
                rows=torch.from_numpy(indices),
                kd_weights=torch.from_numpy(weights),
                divergence=divergence,
                temperature=temperature,
                log_probs=_stack([teachers[i].log_probs for i, _ in chosen]).float(),
                indices=_stack([teachers[i].indices for i, _ in chosen]).long(),
                log_tail=_stack([teachers[i].log_tail for i, _ in chosen]).float(),
            )
        )
    return result


def _stack(arrays) -> torch.Tensor:
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
