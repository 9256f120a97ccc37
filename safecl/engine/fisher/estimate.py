"""Diagonal Fisher information of the memory's rows, shard-local, estimated with random signs.

    F = mean over rows b of g_b^2,   g_b = gradient of the row's mean-token negative log-likelihood

The square of a batch's mean gradient would be about F / B. With independent signs s_b = +-1 the cross terms vanish on
average:
    E[ B * ((1 / B) sum_b s_b g_b)^2 ] = (1 / B) sum_b g_b^2
for any micro-batch, accumulation and world size, without communication beyond the gradient's own. The relative error is
about 0.9 / sqrt(number of sign batches). A sign depends on (seed, row, pass) alone. The model is in evaluation mode:
with dropout, g_b would be the gradient of another, smaller model in each pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from safecl.data.order import keyed_hash
from safecl.engine.passes.step_rows import StepRow
from safecl.engine.passes.training_engine import NonFiniteGradient, TrainingEngine

SECONDS_BETWEEN_NOTES = 15.0
_SUM = "_fisher_sum"  # fp32: a sum in bf16 would lose small squares


def estimate_fisher(
    engine: TrainingEngine,
    rows: Sequence[StepRow],
    row_ids: Sequence[int],
    *,
    seed: int,
    sign_batches: int,
    rows_per_batch: int,
    kind: str,
    note: Callable[[str], None] = lambda message: None,
) -> float:
    """Sum the estimate in fp32, keep it as the state `kind`, and return its mean over all trained weights.

    `rows` are all memory rows (their weights are ignored) and `row_ids` their ids, both the same on every rank. `note`
    gets a message about the progress now and then. With one row a batch and as many batches as rows the Fisher is
    exact: the square removes the sign. Raises NonFiniteGradient.
    """
    noted_at = time.monotonic()
    for shard in engine.optimizer.shards():
        shard.state[_SUM] = torch.zeros_like(shard.param)
    batch_size = min(rows_per_batch, len(rows))
    for number, (indices, signs) in enumerate(sign_batches_of(row_ids, seed, sign_batches, batch_size)):
        # Each row's loss is its own mean over tokens: with the batch's token mean the estimate would not converge.
        chosen = [(rows[index], sign) for index, sign in zip(indices, signs, strict=True)]
        batch = [row.weighted("fisher", sign / (max(1, row.num_targets) * batch_size)) for row, sign in chosen]
        engine.gradient_pass(batch, engine.accumulate_fisher(_SUM, batch_size / sign_batches), dropout=False)
        if time.monotonic() - noted_at > SECONDS_BETWEEN_NOTES:
            noted_at = time.monotonic()
            note(f"Fisher: {number + 1} of {sign_batches} batches")
        if not engine.optimizer.result.applied:
            raise NonFiniteGradient(
                f"Fisher estimate: the gradient of sign batch {number} is not finite; the model cannot be anchored"
            )
    mean = fisher_mean(engine, _SUM)
    if mean <= 0:
        raise NonFiniteGradient("Fisher estimate: all entries are zero; the memory's rows have no gradient")
    for shard in engine.optimizer.shards():
        shard.keep(kind, shard.state.pop(_SUM))
    engine.optimizer.fisher_means[kind] = mean
    return mean


def fisher_mean(engine: TrainingEngine, kind: str) -> float:
    """Mean of a Fisher state over all trained weights (padding is zero and not counted), by one small all-reduce."""
    local = sum(
        (fisher.sum(dtype=torch.float64) for fisher in engine.optimizer.tensors(kind)),
        torch.zeros((), dtype=torch.float64),
    )
    return float(engine.shards.reduce_sum(local)) / engine.shards.numel


def sign_batches_of(
    row_ids: Sequence[int], seed: int, num_batches: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (indices, signs +-1.0) of each sign batch: sweeps over all rows, each in a new order, cut into batches."""
    ids, sweep = np.asarray(row_ids, np.uint64), 0
    queue: list[tuple[int, float]] = []
    for _ in range(num_batches):
        while len(queue) < batch_size:
            order = np.argsort(keyed_hash(ids, "fisher-order", seed, sweep), kind="stable")
            signs = np.where(keyed_hash(ids, "fisher-sign", seed, sweep) & np.uint64(1), 1.0, -1.0)
            queue += [(index, signs[index]) for index in order]
            sweep += 1
        batch, queue = queue[:batch_size], queue[batch_size:]
        yield np.array([index for index, _ in batch]), np.array([sign for _, sign in batch])
