"""Sketches of an answer's gradient at the output head.

    G = mean over the answer's tokens of (p_t - e_{y_t}) h_t^T      [vocabulary, hidden size]

p_t are the model's probabilities, y_t the token that the answer has, and h_t the hidden state that the head reads. A
count sketch (Charikar, Chen & Farach-Colton 2002) adds each row of G, with a random sign, to one of `TOKEN_BUCKETS`
rows, and each column to one of `STATE_BUCKETS` columns. Dot products of sketches estimate those of the gradients
without bias, and a sketch has 4,096 numbers whatever the model. Each is brought to length 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from safecl.kernels.repeatable import add_at_

TOKEN_BUCKETS, STATE_BUCKETS = 128, 32


def gradient_sketches(logits: Tensor, hidden: Tensor, targets: Tensor, row_of: Tensor, num_rows: int) -> Tensor:
    """Return the sketch of each answer, fp32 [num_rows, TOKEN_BUCKETS * STATE_BUCKETS]; 0 for one without tokens.

    logits: [n, vocab] and hidden: [n, H] at the n positions that predict the answers' tokens, targets: int64 [n].
    row_of: int64 [n], the answer of each, counted from 0.
    """
    residual = logits.float().softmax(-1)
    residual[torch.arange(len(targets), device=targets.device), targets] -= 1.0
    tokens, states = _hashed(residual, TOKEN_BUCKETS, 1), _hashed(hidden.float(), STATE_BUCKETS, 2)
    outer = (tokens[:, :, None] * states[:, None, :]).flatten(1)
    sums = add_at_(torch.zeros(num_rows, outer.shape[1], device=outer.device), row_of, outer)
    lengths: Tensor = torch.linalg.vector_norm(sums, dim=1, keepdim=True)
    return sums / lengths.clamp_min(1e-12)


def _hashed(values: Tensor, buckets: int, seed: int) -> Tensor:
    """Add the columns of values [n, m], with random signs, to `buckets` columns."""
    generator = torch.Generator().manual_seed(seed)
    size = values.shape[1]
    place = torch.randint(buckets, (size,), generator=generator).to(values.device)
    sign = (2.0 * torch.randint(2, (size,), generator=generator) - 1.0).to(values.device)
    return add_at_(torch.zeros(buckets, len(values), device=values.device), place, (values * sign).T).T


def padded(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Return a batch of prompts with their answers, padded behind: input_ids [rows, width], inside (bool, same shape),
    and positions (flat), targets and row_of of the answers' tokens."""
    width = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    inside = torch.zeros(len(prompts), width, dtype=torch.bool)
    positions: list[int] = []
    for place, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[place, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        inside[place, : len(prompt) + len(answer)] = True
        first = place * width + len(prompt) - 1
        positions += range(first, first + len(answer))
    return {
        "input_ids": ids,
        "inside": inside,
        "positions": torch.tensor(positions, dtype=torch.int64),
        "targets": torch.tensor([token for answer in answers for token in answer], dtype=torch.int64),
        "row_of": torch.repeat_interleave(torch.tensor([len(answer) for answer in answers])),
    }
