"""The pass before a step's own that finds the mean probabilities of labels over the step's rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from safecl.data import collate
from safecl.distributed import collectives, progress
from safecl.engine.passes.distances import target_positions
from safecl.engine.passes.engine import ModelEngine
from safecl.engine.passes.micro_batches import sequences_of, split_step, to_device
from safecl.engine.passes.step_rows import LabelMean, StepRow


@torch.no_grad()
def fill_label_means(engine: ModelEngine, rows: Sequence[StepRow]) -> None:
    """Compute the mean probabilities of the labels over all rows of the step that have some, with the current weights,
    and set them. A collective call, with the same rows on every rank."""
    for mean in dict.fromkeys(row.labels.mean for row in rows if row.labels is not None):
        numbers = [i for i, row in enumerate(rows) if row.labels is not None and row.labels.mean is mean]
        total = torch.zeros(len(mean.ids), dtype=torch.float64, device=engine.device)
        with engine.evaluation_mode():
            for part in _parts(engine, rows, numbers):
                total += _probabilities(engine, part, mean).double().sum(0)
        mean.value = (collectives.all_reduce_sum(total) / len(numbers)).float().cpu()


def _parts(engine: ModelEngine, rows: Sequence[StepRow], numbers: list[int]) -> list[list[StepRow]]:
    """Return this rank's micro-batches of these rows; each row stays on the rank that computes it in the step."""
    split = enumerate(split_step(rows, engine.layout))
    owner = {number: rank for rank, parts in split for part in parts for number in part}
    own = [replace(rows[number], rank=owner[number]) for number in numbers]
    return [[own[i] for i in part] for part in split_step(own, engine.layout)[engine.rank]]


def _probabilities(engine: ModelEngine, rows: list[StepRow], mean: LabelMean) -> torch.Tensor:
    """fp32 [rows, labels] of a micro-batch, on the device."""
    loaded = [row.load()[0] for row in rows]
    batch = collate(loaded, packed=engine.layout.packed, pad_id=engine.layout.pad_id)
    places = [target_positions(batch, n, row)[0] for n, row in enumerate(loaded)]
    inputs = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "positions": torch.tensor(places, dtype=torch.int64),
        "labels": torch.tensor(mean.ids),
        "sequences": sequences_of(batch, engine.layout.packed),
    }
    output = engine.deepspeed(task="labels", **to_device(inputs, engine.device))
    progress.beat()
    return output["probs"]
