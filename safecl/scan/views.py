"""The views of a scan, combined to one score per row.

    refusal   log p(refusal | prompt)                          safecl/scan/scores.py
    probe     likeness to the known disallowed prompts         safecl/scan/probe.py
    answer    likeness of the answer's gradient to compliance  safecl/scan/answers.py

One view alone is the score as it is. Several are brought to one scale by harmless prompts that are not those from which
the threshold is computed, and the highest counts, so that one view suffices to flag a row:

    score = max over the views of (s - q50) / (q95 - q50)       quantiles of s over these harmless prompts

The rule is fixed before the threshold's own harmless rows are looked at, so their bound on false alarms holds for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from safecl.data.tokens import Row, TokenDataset
from safecl.evaluation.answers.model import EvalModel, gather_in_order, shard_of
from safecl.evaluation.answers.prompts import pad_id_of
from safecl.scan.answers import Pair, answer_scores, fit_answers
from safecl.scan.known import ANSWER, PROBE, REFUSAL
from safecl.scan.probe import Probe, cross_fitted, fit, probe_scores, states_of, states_of_known
from safecl.scan.scores import DIGITS, Openings, refusal_scores, score_prompts

MEDIAN, TAIL = 0.5, 0.95
SMALLEST_SPREAD = 1e-3

Prompts = Sequence[Sequence[int]]
"""Token ids of prompts, up to the answer."""


@dataclass(frozen=True)
class Scale:
    """The place and spread of harmless prompts in one view."""

    middle: float
    spread: float

    @classmethod
    def of(cls, harmless: np.ndarray) -> Scale:
        middle, tail = np.quantile(harmless, [MEDIAN, TAIL])
        return cls(float(middle), max(float(tail - middle), SMALLEST_SPREAD))

    def apply(self, scores: np.ndarray) -> np.ndarray:
        return (scores - self.middle) / self.spread


@dataclass(frozen=True)
class Views:
    """The views of one scan. Its methods are collective calls, with the same rows or prompts on every rank."""

    model: EvalModel
    tokenizer: Any
    openings: Openings
    probe: Probe | None = None
    answer: Probe | None = None
    scales: tuple[tuple[str, Scale], ...] = ()
    """By view; empty where one view alone is the score."""
    names: tuple[str, ...] = (REFUSAL,)

    def of_rows(self, rows: TokenDataset | Sequence[Row]) -> dict[str, np.ndarray]:
        """Return the scores of rows in each view, fp64 [N] each."""
        found = {}
        if REFUSAL in self.names:
            found[REFUSAL] = refusal_scores(self.model, self.tokenizer, rows, self.openings)
        if self.probe is not None:
            found[PROBE] = probe_scores(self.model, self.tokenizer, rows, self.probe)
        if self.answer is not None:
            found[ANSWER] = answer_scores(self.model, self.tokenizer, rows, self.answer)
        return found

    def of_prompts(self, prompts: Prompts) -> dict[str, np.ndarray]:
        """Return the scores of prompts in each view, fp64 [n] each. Not with the view of answers."""
        assert self.answer is None, "prompts have no answers"
        found = {}
        if REFUSAL in self.names:
            found[REFUSAL] = refusal_of_prompts(self.model, self.tokenizer, prompts, self.openings)
        if self.probe is not None:
            own = states_of(self.model, shard_of(self.model, prompts), pad_id_of(self.tokenizer))
            scores = self.probe.scores(own).tolist() if len(own) else []
            found[PROBE] = np.array(gather_in_order(self.model, scores))
        return found

    def combined(self, by_view: dict[str, np.ndarray]) -> np.ndarray:
        """Return one score of each row or prompt, fp64 [n], rounded."""
        if not self.scales:
            (alone,) = by_view.values()
            return alone.round(DIGITS)
        return np.max([scale.apply(by_view[name]) for name, scale in self.scales], axis=0).round(DIGITS)

    def leading(self, by_view: dict[str, np.ndarray], index: int) -> str:
        """Return the view in which a row scores highest."""
        if not self.scales:
            return next(iter(by_view))
        return max(self.scales, key=lambda named: float(named[1].apply(by_view[named[0]][index])))[0]


def refusal_of_prompts(model: EvalModel, tokenizer: Any, prompts: Prompts, openings: Openings) -> np.ndarray:
    """Return the refusal scores of prompts, fp64 [n], the same on every rank. A collective call."""
    scores = score_prompts(model, shard_of(model, prompts), openings, pad_id_of(tokenizer))
    return np.array(gather_in_order(model, scores.tolist()))


@dataclass(frozen=True)
class KnownPrompts:
    """The prompts that the views are fitted to. answers: pairs of the harmless prompts with their own answers, in their
    order; only with the view of answers."""

    disallowed: Prompts
    harmless: Prompts
    answers: Sequence[Pair] = ()


def open_views(
    model: EvalModel, tokenizer: Any, openings: Openings, names: Sequence[str], prompts: KnownPrompts
) -> tuple[Views, np.ndarray]:
    """Fit what the views need, and return them with the scores of the known disallowed prompts, fp64 [n].

    The harmless prompts, for the probe, the answers and the scales, must not be used for a threshold again. A
    collective call.
    """
    known, reference = dict[str, np.ndarray](), dict[str, np.ndarray]()
    probe = answer = None
    if PROBE in names:
        states = [states_of_known(model, tokenizer, own) for own in (prompts.disallowed, prompts.harmless)]
        known[PROBE], reference[PROBE] = cross_fitted(*states)
        probe = fit(*states)
    if ANSWER in names:
        answer, known[ANSWER], reference[ANSWER] = fit_answers(
            model, tokenizer, prompts.disallowed, openings, prompts.answers
        )
    if REFUSAL in names:
        known[REFUSAL] = refusal_of_prompts(model, tokenizer, prompts.disallowed, openings)
        if len(names) > 1:
            reference[REFUSAL] = refusal_of_prompts(model, tokenizer, prompts.harmless, openings)
    scales = tuple((name, Scale.of(reference[name])) for name in names) if len(names) > 1 else ()
    views = Views(model, tokenizer, openings, probe, answer, scales, tuple(names))
    return views, views.combined(known)
