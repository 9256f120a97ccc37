"""Scores rows by how probable it is that the aligned model refuses their prompt.

    score(row) = max over the row's answers of  log sum_r p(refusal_r | everything before the answer)

The score is the natural logarithm of the probability that the model's answer opens with one of its usual refusals, and
at most 0. The refusals are a few tokens each, and disjoint events. All use the cache of one forward pass over the
prompt.

A reasoning model's prompt ends with an empty thought, so that an answer is what follows.

The row's own answer does not matter: the aligned model refuses the prompt for any answer of the row. All answers of a
conversation count, so that a disallowed turn cannot hide before a harmless last one. A row of plain text has no prompt;
the text itself is used as the user's message.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from safecl.data.messages import Message
from safecl.data.templates.chat import prompt_ids
from safecl.data.templates.thinking import with_empty_thought
from safecl.data.tokens import Row, TokenDataset
from safecl.evaluation.answers.model import EvalModel, gather_in_order, shard_of
from safecl.evaluation.answers.prompts import pad_id_of

BATCH_TOKENS = 16384
LOGITS_BYTES = 2**28
DIGITS = 4
"""Decimal places of scores and thresholds. Further digits depend on which prompts share a batch, and so on the number
of ranks."""

Openings = Sequence[tuple[int, ...]]


def refusal_scores(
    model: EvalModel, tokenizer: Any, rows: TokenDataset | Sequence[Row], refusals: Openings
) -> np.ndarray:
    """Score every row: fp64 [N], the same on every rank. A collective call with the same rows everywhere.

    Args: `rows`, tokenised; `refusals`: token ids of openings, as they follow the template's opening of an answer.
    """
    own = shard_of(model, range(len(rows)))
    prompts: list[list[int]] = []
    row_of: list[int] = []
    for place, index in enumerate(own):
        found = prompts_of(tokenizer, rows.row(index) if isinstance(rows, TokenDataset) else rows[index])
        prompts += [with_empty_thought(tokenizer, prompt) for prompt in found]
        row_of += [place] * len(found)
    best = np.full(len(own), -np.inf)
    np.maximum.at(best, np.array(row_of, np.int64), score_prompts(model, prompts, refusals, pad_id_of(tokenizer)))
    return np.array(gather_in_order(model, best.tolist()))


def prompts_of(tokenizer: Any, row: Row) -> list[list[int]]:
    """Return the token ids before each of the row's answers; for plain text, those of the text as a user's message."""
    starts = np.flatnonzero(np.diff(row.loss_mask.astype(np.int8), prepend=0) == 1)
    if starts[0] <= 1:  # at most a start token precedes the trained tokens: plain text
        text = tokenizer.decode(row.input_ids, skip_special_tokens=True)
        return [list(prompt_ids(tokenizer, [Message("user", text)]))]
    return [row.input_ids[:start].tolist() for start in starts]


@torch.no_grad()
def score_prompts(model: EvalModel, prompts: Sequence[Sequence[int]], refusals: Openings, pad_id: int) -> np.ndarray:
    """Compute log sum_r p(refusal_r | prompt) of this rank's prompts: fp64 [prompts].

    A collective call; ranks may have different numbers of prompts, also none.
    """
    longest = max(map(len, refusals))
    room = (getattr(model, "max_positions", None) or 10**9) - longest
    prompts = [prompt[-room:] for prompt in prompts]  # the end of a prompt holds the request
    most_rows = max(1, LOGITS_BYTES // (4 * model.vocab_size * len(refusals) * longest))
    batches = list(batches_of(list(map(len, prompts)), most_rows))
    scores = np.zeros(len(prompts))
    while model.any(bool(batches)):
        batch = batches.pop(0) if batches else []
        found = _score_batch(model, [prompts[i] for i in batch] or [[pad_id]], refusals, pad_id)  # [batch, refusals]
        scores[batch] = found.logsumexp(1).cpu().numpy()[: len(batch)]
    return scores


def batches_of(lengths: list[int], most_rows: int) -> Iterator[list[int]]:
    """Yield batches of prompts of similar length, the longest first."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if batch and (len(batch) == most_rows or (len(batch) + 1) * lengths[batch[0]] > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _score_batch(model: EvalModel, prompts: list[Sequence[int]], refusals: Openings, pad_id: int) -> torch.Tensor:
    """Compute log p(refusal | prompt): fp64 [prompts, refusals]."""
    num, width, longest = len(refusals), max(map(len, prompts)), max(map(len, refusals))
    ids, mask = torch.full((len(prompts), width), pad_id), torch.zeros(len(prompts), width, dtype=torch.long)
    for place, prompt in enumerate(prompts):
        ids[place, width - len(prompt) :] = torch.as_tensor(prompt)
        mask[place, width - len(prompt) :] = 1
    targets = torch.tensor([[*refusal, *[-1] * (longest - len(refusal))] for refusal in refusals], device=model.device)
    ids, mask = ids.to(model.device), mask.to(model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits, past = model.logits(ids, mask, positions, use_cache=True, last_only=True)
    total = logits[:, -1].float().log_softmax(-1)[:, targets[:, 0]].double()  # [prompts, refusals]
    if longest > 1:
        past.batch_repeat_interleave(num)
        given = targets[:, :-1].clamp(min=0).repeat(len(prompts), 1)  # [prompts * refusals, longest - 1]
        positions = positions[:, -1:].repeat_interleave(num, 0) + torch.arange(1, longest, device=model.device)
        mask = torch.cat([mask.repeat_interleave(num, 0), torch.ones_like(given)], 1)
        logits, _ = model.logits(given, mask, positions, past=past, use_cache=True)
        wanted = targets[:, 1:].repeat(len(prompts), 1)
        found = logits.float().log_softmax(-1).gather(-1, wanted.clamp(min=0)[..., None])[..., 0].double()
        total = total + found.masked_fill(wanted < 0, 0.0).sum(-1).view(len(prompts), num)
    return total
