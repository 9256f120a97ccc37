"""A linear probe on the aligned model's hidden states: how much a prompt is like the known disallowed ones.

    x(prompt) = mean over the prompt's tokens of the hidden states behind layer round(2/3 L)
    score = w . (x - m) / s + b,     w, b = ridge regression of +1 (disallowed) and -1 (harmless)

m and s are mean and standard deviation of the known prompts by element. Both classes weigh the same whatever their
sizes. The hidden states of the middle layers tell what a request is about also where it is disguised, and where the
model would answer it: the refusal score (safecl/scan/scores.py) is blind there.

Scores of the known prompts themselves are cross-fitted: each comes from a probe that has not seen it, since a probe
separates the prompts that it was fitted on too well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from safecl.config import ConfigError
from safecl.data.templates.thinking import with_empty_thought
from safecl.data.tokens import Row, TokenDataset
from safecl.evaluation.answers.model import EvalModel, gather_in_order, shard_of
from safecl.evaluation.answers.prompts import pad_id_of
from safecl.scan.scores import batches_of, prompts_of

DEPTH = 2 / 3
RIDGE = 1.0
"""Strength of the regularization, in units of the mean squared length of a standardized state."""
FOLDS = 5
MOST_ROWS = 8
"""Prompts in a batch: the hidden states of all layers exist at once."""


@dataclass(frozen=True)
class Probe:
    """A fitted probe. mean, scale, weight: fp64 [H]."""

    mean: np.ndarray
    scale: np.ndarray
    weight: np.ndarray
    bias: float

    def scores(self, states: np.ndarray) -> np.ndarray:
        """Return fp64 [n] of states [n, H]; above 0 a prompt is more like the disallowed ones."""
        return ((states - self.mean) / self.scale) @ self.weight + self.bias


def fit(disallowed: np.ndarray, harmless: np.ndarray) -> Probe:
    """Fit a probe to states [n, H] of both kinds, by ridge regression in its dual form."""
    states = np.concatenate([disallowed, harmless]).astype(np.float64)
    mean, scale = states.mean(0), states.std(0) + 1e-6
    x = (states - mean) / scale
    y = np.concatenate([np.ones(len(disallowed)), -np.ones(len(harmless))])
    share = np.where(y > 0, 0.5 / len(disallowed), 0.5 / len(harmless))  # of each row in the loss
    center, level = share @ x, share @ y
    rows = np.sqrt(share)[:, None] * (x - center)
    gram = rows @ rows.T
    strength = RIDGE * np.trace(gram) / len(rows)
    dual = np.linalg.solve(gram + strength * np.eye(len(rows)), np.sqrt(share) * (y - level))
    weight = rows.T @ dual
    return Probe(mean, scale, weight, float(level - center @ weight))


def cross_fitted(disallowed: np.ndarray, harmless: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores of both kinds of known prompts, fp64 [n] each, by probes that have not seen them."""
    found = np.zeros(len(disallowed)), np.zeros(len(harmless))
    for fold in range(FOLDS):
        out = [np.arange(len(states)) % FOLDS == fold for states in (disallowed, harmless)]
        probe = fit(disallowed[~out[0]], harmless[~out[1]])
        found[0][out[0]], found[1][out[1]] = probe.scores(disallowed[out[0]]), probe.scores(harmless[out[1]])
    return found


@torch.no_grad()
def states_of(model: EvalModel, prompts: Sequence[Sequence[int]], pad_id: int) -> np.ndarray:
    """Compute x of this rank's prompts: fp32 [prompts, H].

    A collective call; ranks may have different numbers of prompts, also none. Raises ConfigError for a model that gives
    no hidden states.
    """
    mean_states = getattr(model, "mean_states", None)
    if mean_states is None:
        raise ConfigError("scan.views: this model gives no hidden states; leave out `probe`")
    room = getattr(model, "max_positions", None) or 10**9
    prompts = [prompt[-room:] for prompt in prompts]
    waiting = list(batches_of(list(map(len, prompts)), MOST_ROWS))
    found: list[tuple[int, np.ndarray]] = []
    while model.any(bool(waiting)):
        batch = waiting.pop(0) if waiting else []
        states = mean_states([prompts[i] for i in batch] or [[pad_id]], DEPTH).float().cpu().numpy()
        found += zip(batch, states, strict=False)
    return np.stack([state for _, state in sorted(found, key=lambda item: item[0])]) if found else np.zeros((0, 1))


def states_of_known(model: EvalModel, tokenizer: Any, prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """Compute x of these prompts: fp32 [prompts, H], the same on every rank. A collective call."""
    return np.stack(gather_in_order(model, list(states_of(model, shard_of(model, prompts), pad_id_of(tokenizer)))))


def probe_scores(model: EvalModel, tokenizer: Any, rows: TokenDataset | Sequence[Row], probe: Probe) -> np.ndarray:
    """Score every row, by the prompt that scores highest where it has several answers: fp64 [N], the same on every
    rank. A collective call with the same rows everywhere."""
    own = shard_of(model, range(len(rows)))
    prompts: list[list[int]] = []
    row_of: list[int] = []
    for place, index in enumerate(own):
        found = prompts_of(tokenizer, rows.row(index) if isinstance(rows, TokenDataset) else rows[index])
        prompts += [with_empty_thought(tokenizer, prompt) for prompt in found]
        row_of += [place] * len(found)
    best = np.full(len(own), -np.inf)
    states = states_of(model, prompts, pad_id_of(tokenizer))
    if len(states):
        np.maximum.at(best, np.array(row_of, np.int64), probe.scores(states))
    return np.array(gather_in_order(model, best.tolist()))
