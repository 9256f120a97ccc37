"""Log-likelihood of given answers, in batches and in lockstep over ranks.

log p(y | x) = Σ_t log softmax(z_t)[y_t]   over the supervised tokens, log-softmax in fp32, sums in fp64
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from safecl.distributed import progress
from safecl.evaluation.answers.model import EvalModel

LOGITS_BYTES = 2**30
"""Target for the fp32 bytes of logits [batch, length, vocab] of a forward pass."""

TOKENS_AT_ONCE = 512
"""Number of scored tokens whose logits are converted to fp32 together."""


Array = np.ndarray[Any, np.dtype[Any]]
TokensAndMask = tuple[Sequence[int] | Array, Sequence[bool] | Array]
"""Token ids of a row, and which of them are scored."""


class Scored(NamedTuple):
    """A row's summed log-probability (natural log, at most 0) and the number of tokens summed."""

    log_prob: float
    num_tokens: int
    lead: float = math.inf
    """Least lead of a summed token over the likeliest other one, in nats: above 0 where greedy decoding says them all.
    Infinite unless it was asked for."""


@torch.no_grad()
def log_likelihoods(
    model: EvalModel,
    rows: Sequence[TokensAndMask],
    *,
    pad_id: int,
    logits_bytes: int = LOGITS_BYTES,
    with_lead: bool = False,
) -> list[Scored]:
    """Compute the log-probability of the supervised tokens of each row of this rank.

    Args: `rows`: pairs of token ids and a mask of the same length, true where a token is scored given all tokens before
    it (the first token has none before it and is never scored). The number of rows may differ between ranks.
    `with_lead`: compute the leads as well.
    Returns: one `Scored` per row, in order.
    """
    batches = _batches([len(ids) for ids, _ in rows], model.vocab_size, logits_bytes)
    scored = [Scored(0.0, 0)] * len(rows)
    with progress.counted("rows", len(rows)) as made:
        while model.any(bool(batches)):
            batch = batches.pop(0) if batches else []
            found = _score_batch(model, [rows[index] for index in batch], pad_id, with_lead)
            for index, result in zip(batch, found, strict=True):
                scored[index] = result
            made(len(batch))
    return scored


def _batches(lengths: list[int], vocab_size: int, logits_bytes: int) -> list[list[int]]:
    """Group rows by length, longest first, each batch within the bytes (or of one row)."""
    most_tokens = max(1, logits_bytes // (4 * vocab_size))
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        width = lengths[batches[-1][0]] if batches else 0
        if batches and (len(batches[-1]) + 1) * width <= most_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _score_batch(model: EvalModel, rows: list[TokensAndMask], pad_id: int, with_lead: bool) -> list[Scored]:
    ids, mask, scored = _pad_right(rows or [([pad_id], [False])], pad_id)
    positions = torch.arange(ids.shape[1]).expand_as(ids).contiguous()
    device = model.device
    logits, _ = model.logits(ids.to(device), mask.to(device), positions.to(device))  # [batch, length, vocab]
    results = []
    for row in range(len(rows)):
        places = scored[row, 1:].nonzero()[:, 0].to(device)  # the token at place + 1 is predicted at place
        targets = ids[row, 1:].to(device)[places]
        pieces = [*zip(torch.split(places, TOKENS_AT_ONCE), torch.split(targets, TOKENS_AT_ONCE), strict=True)]
        lead = min((_lead(logits[row], *piece) for piece in pieces), default=math.inf) if with_lead else math.inf
        results.append(Scored(sum(_sum_log_probs(logits[row], *piece) for piece in pieces), len(places), lead))
    return results


def _lead(logits: torch.Tensor, places: torch.Tensor, targets: torch.Tensor) -> float:
    if not len(places):
        return math.inf
    scores = logits[places].float()  # [places, vocab]
    own = scores.gather(1, targets[:, None])[:, 0]
    others = scores.scatter(1, targets[:, None], float("-inf")).max(1).values
    return float((own - others).min())


def _sum_log_probs(logits: torch.Tensor, places: torch.Tensor, targets: torch.Tensor) -> float:
    log_probs = torch.log_softmax(logits[places].float(), dim=-1)  # [places, vocab]
    return float(log_probs.gather(1, targets[:, None]).double().sum())


def _pad_right(rows: list[TokensAndMask], pad_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    scored = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (tokens, supervised) in enumerate(rows):
        ids[row, : len(tokens)] = torch.as_tensor(tokens, dtype=torch.long)
        scored[row, : len(tokens)] = torch.as_tensor(supervised, dtype=torch.bool)
        mask[row, : len(tokens)] = 1
    return ids, mask, scored
