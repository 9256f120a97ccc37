"""The current model's outputs on many rows, one forward pass each, in any ZeRO stage and on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
import torch

from safecl.data import Row, TokenDataset, collate
from safecl.distributed import progress
from safecl.engine.passes.distances import token_positions
from safecl.engine.passes.engine import ModelEngine
from safecl.engine.passes.micro_batches import sequences_of, split_step, to_device
from safecl.engine.passes.step_rows import StepRow
from safecl.methods.terms import Tokens
from safecl.replay import TeacherOutputs

MICRO_BATCHES_AT_ONCE = 16

Outputs = Iterator[tuple[int, dict[str, torch.Tensor]]]
"""(row index, output tensors [tokens, ...] on the CPU)."""


@torch.no_grad()
def outputs_of_rows(
    engine: ModelEngine,
    dataset: TokenDataset,
    task: str,
    *,
    tokens: Tokens = "supervised",
    rank_of: np.ndarray | None = None,
    alone: bool = False,
    **settings: Any,
) -> Outputs:
    """Yield the outputs of this rank's share of the rows. A collective call: every rank must consume all of its share.

    task, settings: of LanguageModel.forward ("topk" with k and temperature, which also gives the targets' `nll`,
    "gradient", or "hidden"). Other tokens than the supervised are for "hidden" only. Exactly one rank computes a row:
    that of `rank_of` [rows], or else one that depends on the lengths alone. alone: each row has a forward pass of
    its own. The last bits of its outputs then do not depend on the rows beside it.
    """
    layout = engine.layout
    with engine.evaluation_mode():
        for indices in _chunks(
            dataset.lengths, layout.world_size * layout.tokens_per_microbatch * MICRO_BATCHES_AT_ONCE
        ):
            rows = [_row_to_place(dataset, i, None if rank_of is None else int(rank_of[i])) for i in indices]
            split = split_step(rows, layout)
            for part in (_one_by_one(split) if alone else split)[engine.rank]:
                chosen = [int(indices[j]) for j in part]
                yield from _outputs_of(engine, chosen, dataset.rows(chosen), task, tokens, settings)


def _one_by_one(split: list[list[list[int]]]) -> list[list[list[int]]]:
    """Cut each rank's micro-batches into rows. Ranks with fewer rows get empty ones: each is a collective call."""
    rows = [[[index] for part in parts for index in part] for parts in split]
    most = max(map(len, rows))
    return [parts + [[]] * (most - len(parts)) for parts in rows]


def _row_to_place(dataset: TokenDataset, index: int, rank: int | None) -> StepRow:
    """Return a row for `split_step`, which reads its length only."""
    return StepRow("", int(dataset.lengths[index]), int(dataset.num_targets[index]), _not_loaded, rank=rank)


def _not_loaded() -> NoReturn:
    raise AssertionError("the data set gives these rows")


def _chunks(lengths: np.ndarray, num_tokens: int) -> Iterator[np.ndarray]:
    """Yield runs of row indices of about `num_tokens` tokens, so that not all token ids are in memory at once."""
    chunk = np.cumsum(lengths, dtype=np.int64) // num_tokens
    yield from np.split(np.arange(len(lengths)), np.flatnonzero(np.diff(chunk)) + 1)


def _outputs_of(
    engine: ModelEngine,
    indices: Sequence[int],
    rows: Sequence[Row],
    task: str,
    tokens: Tokens,
    settings: dict[str, Any],
) -> Outputs:
    batch = collate(rows, packed=engine.layout.packed, pad_id=engine.layout.pad_id)
    places = [token_positions(batch, n, row, tokens) for n, row in enumerate(rows)]
    positions = torch.from_numpy(np.concatenate(places) if places else np.zeros(0, np.int64))
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "positions": positions,
        "sequences": sequences_of(batch, engine.layout.packed),
    }
    if task in ("topk", "gradient"):
        inputs["targets"] = batch.targets[positions]
    if task == "gradient":
        inputs["row_of"] = torch.from_numpy(np.repeat(np.arange(len(places)), [len(place) for place in places]))
    inputs = to_device(inputs, engine.device)
    output = {key: value.cpu() for key, value in engine.deepspeed(task=task, **inputs, **settings).items()}
    progress.beat()
    first = np.cumsum([0, *(len(place) for place in places)])
    for n, index in enumerate(indices):
        yield index, {key: value[first[n] : first[n + 1]] for key, value in output.items()}


def stored_form(output: dict[str, Any]) -> TeacherOutputs:
    """Return outputs of LanguageModel.topk in the dtypes in which they are stored."""
    return TeacherOutputs(
        log_probs=output["log_probs"].numpy().astype(np.float16),
        indices=output["indices"].numpy().astype(np.int32),
        log_tail=output["log_tail"].numpy().astype(np.float32),
    )


def mean_nll(output: dict[str, Any]) -> float:
    """Mean NLL of the targets, nats per token; NaN for a row without targets."""
    return float(output["nll"].double().mean()) if len(output["nll"]) else float("nan")
