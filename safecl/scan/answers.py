"""The answer view of a scan: whether a row's answer would move the aligned model as compliance with a disallowed
request would.

    g(x, a) = sketch of the gradient at the output head of the first tokens of answer a
    score   = w . (g - m) / s + b,     w, b = ridge regression of
                  +1: known disallowed prompts, answered with openings that comply
                  -1: the same prompts, answered with the model's own refusals;
                      known harmless prompts, answered with their own answers and with openings that comply

The direction is that of complying minus refusing, in contrast to harmless answers. The opening itself weighs most: a
harmless answer that opens with "Sure" scores like compliance where the harmless rows of the threshold open otherwise,
and compliance in other words scores lower.

Sketches are those of safecl/evaluation/answers/sketch.py. The regression is that of the probe (safecl/scan/probe.py),
and so is the cross-fitting: scores of known prompts come from fits that have not seen them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from safecl.config import ConfigError
from safecl.data.templates.thinking import with_empty_thought, without_empty_thought
from safecl.data.tokens import Row, TokenDataset
from safecl.evaluation.answers.model import EvalModel, gather_in_order, shard_of
from safecl.evaluation.answers.prompts import pad_id_of
from safecl.scan.probe import FOLDS, Probe, fit
from safecl.scan.refusals import opening_of
from safecl.scan.scores import LOGITS_BYTES, Openings, batches_of, prompts_of

COMPLIES = ("Sure, here is", "Of course. Here is how", "Certainly! To do this", "Yes. First,")
"""Openings of answers that comply."""
TOKENS = 8
"""First tokens of an answer that count."""

Pair = tuple[list[int], list[int]]
"""Token ids of a prompt, up to the answer, and of the answer's first tokens."""


def complying(tokenizer: Any, prompts: Sequence[Sequence[int]]) -> list[Pair]:
    """Return these prompts with openings that comply, which take turns."""
    openings = [list(opening_of(tokenizer, text, TOKENS)) for text in COMPLIES]
    return [(list(prompt), openings[place % len(openings)]) for place, prompt in enumerate(prompts)]


def refusing(prompts: Sequence[Sequence[int]], refusals: Openings) -> list[Pair]:
    """Return these prompts with the model's own refusals, which take turns."""
    return [(list(prompt), list(refusals[place % len(refusals)][:TOKENS])) for place, prompt in enumerate(prompts)]


def pairs_of(tokenizer: Any, row: Row) -> list[Pair]:
    """Return each prompt of a row with its answer; plain text has the first opening that complies."""
    prompts = [with_empty_thought(tokenizer, prompt) for prompt in prompts_of(tokenizer, row)]
    edges = np.diff(row.loss_mask.astype(np.int8), prepend=0, append=0)
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    if starts[0] <= 1:  # as in prompts_of: there is no prompt
        return complying(tokenizer, prompts)
    answers = [row.input_ids[start:end].tolist() for start, end in zip(starts, ends, strict=True)]
    return [
        (prompt, list(without_empty_thought(tokenizer, answer))[:TOKENS])
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


@torch.no_grad()
def sketches_of(model: EvalModel, pairs: Sequence[Pair], pad_id: int) -> np.ndarray:
    """Compute g of this rank's pairs: fp32 [pairs, 4096].

    A collective call; ranks may have different numbers of pairs, also none. Raises ConfigError for a model that gives
    no hidden states.
    """
    sketches = getattr(model, "answer_sketches", None)
    if sketches is None:
        raise ConfigError("scan.views: this model gives no hidden states; leave out `answer`")
    room = (getattr(model, "max_positions", None) or 10**9) - TOKENS
    pairs = [(prompt[-room:], answer) for prompt, answer in pairs]
    lengths = [len(prompt) + len(answer) for prompt, answer in pairs]
    most_rows = max(1, LOGITS_BYTES // (4 * model.vocab_size * max(lengths, default=1)))
    waiting = list(batches_of(lengths, most_rows))
    found: list[tuple[int, np.ndarray]] = []
    while model.any(bool(waiting)):
        batch = waiting.pop(0) if waiting else []
        asked = [pairs[i] for i in batch] or [([pad_id], [pad_id])]
        values = sketches([prompt for prompt, _ in asked], [answer for _, answer in asked]).float().cpu().numpy()
        found += zip(batch, values, strict=False)
    return np.stack([one for _, one in sorted(found, key=lambda item: item[0])]) if found else np.zeros((0, 1))


def sketches_of_known(model: EvalModel, tokenizer: Any, pairs: Sequence[Pair]) -> np.ndarray:
    """Compute g of these pairs: fp32 [pairs, 4096], the same on every rank. A collective call."""
    own = sketches_of(model, shard_of(model, pairs), pad_id_of(tokenizer))
    return np.stack(gather_in_order(model, list(own)))


def fit_answers(
    model: EvalModel,
    tokenizer: Any,
    disallowed: Sequence[Sequence[int]],
    refusals: Openings,
    harmless: Sequence[Pair],
) -> tuple[Probe, np.ndarray, np.ndarray]:
    """Fit the view. Returns it, and the scores of known compliance fp64 [disallowed] and of known harmless answers fp64
    [harmless], by fits that have not seen them. A collective call."""
    prompts = [prompt for prompt, _ in harmless]
    sets = (
        complying(tokenizer, disallowed),
        refusing(disallowed, refusals),
        list(harmless),
        complying(tokenizer, prompts),
    )
    comply, refuse, own, sure = (sketches_of_known(model, tokenizer, pairs) for pairs in sets)
    return fit_sketches(comply, refuse, own, sure)


def fit_sketches(
    comply: np.ndarray, refuse: np.ndarray, own: np.ndarray, sure: np.ndarray
) -> tuple[Probe, np.ndarray, np.ndarray]:
    """Do what `fit_answers` does, from sketches [n, 4096]: of disallowed prompts with compliance and with refusals, and
    of harmless prompts with their own answers and with compliance."""
    known, reference = np.zeros(len(comply)), np.zeros(len(own))
    for fold in range(FOLDS):
        left, right = (np.arange(len(values)) % FOLDS == fold for values in (comply, own))
        view = fit(comply[~left], np.concatenate([refuse[~left], own[~right], sure[~right]]))
        known[left], reference[right] = view.scores(comply[left]), view.scores(own[right])
    return fit(comply, np.concatenate([refuse, own, sure])), known, reference


def answer_scores(model: EvalModel, tokenizer: Any, rows: TokenDataset | Sequence[Row], view: Probe) -> np.ndarray:
    """Score every row, by the answer that scores highest where it has several: fp64 [N], the same on every rank. A
    collective call with the same rows everywhere."""
    own = shard_of(model, range(len(rows)))
    pairs: list[Pair] = []
    row_of: list[int] = []
    for place, index in enumerate(own):
        found = pairs_of(tokenizer, rows.row(index) if isinstance(rows, TokenDataset) else rows[index])
        pairs += found
        row_of += [place] * len(found)
    best = np.full(len(own), -np.inf)
    sketches = sketches_of(model, pairs, pad_id_of(tokenizer))
    if len(sketches):
        np.maximum.at(best, np.array(row_of, np.int64), view.scores(sketches))
    return np.array(gather_in_order(model, best.tolist()))
