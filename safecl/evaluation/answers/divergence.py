"""The divergence from the aligned model on given rows: KL of the outputs at the supervised tokens.

    KL = Σ_v p(v) (log p(v) - log q(v))      p: aligned, q: the model as it is now, at one token; nats

Of p the k likeliest tokens are kept and the mass of all others as one outcome, which bounds the KL from below (data
processing inequality); the others hold little mass. The mean over the tokens of new data predicts forgetting of old
behaviour (Shenfeld et al. 2025, arXiv 2509.04259).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from safecl.evaluation.answers.model import EvalModel, gather_in_order, shard_of
from safecl.evaluation.statistics.intervals import Mean, token_mean

TOP_K = 64
SMALLEST_TAIL = 1e-12

Array = np.ndarray[Any, np.dtype[Any]]


class ScoredRow(NamedTuple):
    """Token ids of a row, and which of them are supervised (never the first)."""

    input_ids: Array
    loss_mask: Array


class TopOutputs(NamedTuple):
    """The outputs of one row at its supervised tokens: log-probabilities and ids of the likeliest, [tokens, k]."""

    log_probs: Array
    indices: Array


@torch.no_grad()
def top_outputs(model: EvalModel, rows: Sequence[ScoredRow], k: int = TOP_K) -> list[TopOutputs]:
    """Compute the outputs of all rows, on every rank. Each rank does its share, a row a forward pass."""
    found = []
    for log_probs in _passes(model, shard_of(model, rows)):
        top = log_probs.topk(min(k, log_probs.shape[-1]), dim=-1)
        found.append(TopOutputs(top.values.cpu().numpy(), top.indices.to(torch.int32).cpu().numpy()))
    return gather_in_order(model, found)


@torch.no_grad()
def divergence(model: EvalModel, rows: Sequence[ScoredRow], aligned: Sequence[TopOutputs]) -> Mean:
    """Compute the mean KL per supervised token from the aligned model's outputs, with rows as the sampling unit. The
    same on every rank."""
    sums = []
    for log_q, reference in zip(_passes(model, shard_of(model, rows)), shard_of(model, aligned), strict=True):
        log_p = torch.from_numpy(reference.log_probs).double()
        chosen = log_q.cpu().double().gather(1, torch.from_numpy(reference.indices).long())
        terms = (log_p.exp() * (log_p - chosen)).sum(1) + _tail(log_p, chosen)
        sums.append((float(terms.sum()), len(terms)))
    every = gather_in_order(model, sums)
    return token_mean([total for total, _ in every], [count for _, count in every])


def _tail(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Return the KL term of all tokens that are not kept, taken together: [tokens]."""
    p, q = ((1 - logs.exp().sum(1)).clamp_min(SMALLEST_TAIL) for logs in (log_p, log_q))
    return p * (p.log() - q.log())


def _passes(model: EvalModel, rows: Sequence[ScoredRow]) -> Iterator[torch.Tensor]:
    """Yield the log-probabilities [supervised tokens, vocab] of each of this rank's rows. All ranks make as many
    passes, if they take all."""
    number = 0
    while model.any(number < len(rows)):
        row = rows[number] if number < len(rows) else None
        number += 1
        ids = torch.tensor(row.input_ids if row is not None else [0], dtype=torch.long)[None]
        positions = torch.arange(ids.shape[1])[None]
        mask = torch.ones_like(ids)
        logits, _ = model.logits(ids.to(model.device), mask.to(model.device), positions.to(model.device))
        if row is not None:
            places = torch.tensor(row.loss_mask[1:]).nonzero()[:, 0].to(model.device)
            yield torch.log_softmax(logits[0][places].float(), dim=-1)
