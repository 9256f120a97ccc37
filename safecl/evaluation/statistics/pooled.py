"""A rate over several runs on the same prompts: its mean and spread over runs, and one interval for all of them.

Of n prompts, prompt i has m_i decided outcomes, one a run, and h_i hits; p = Σ h_i / Σ m_i. Answers of one prompt in
several runs are not independent, so prompts are the sampling unit (Rao and Scott 1992, Biometrics 48, 577):

    v   = n / (n - 1) Σ (h_i - p m_i)² / (Σ m_i)²         variance of p with clusters
    D   = v / (p (1 - p) / Σ m_i)                          design effect, kept within 1 and the number of runs
    n'  = Σ m_i / D                                        effective number of trials, for Wilson's interval

Where p is 0 or 1 nothing is known of D, and the number of runs is taken: n' is then the number of prompts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safecl.evaluation.statistics.intervals import Z95
from safecl.evaluation.statistics.paired import sign_test

Outcomes = Mapping[Hashable, bool | None]
"""The outcome of each prompt in one run, by the prompt's id; None is undecided."""


@dataclass(frozen=True)
class Spread:
    """A number over the runs of a cell: mean, standard deviation over runs (0 for one run), and the pooled 95 %
    interval; None for a number that has no interval."""

    mean: float
    std: float
    num_runs: int
    low: float | None = None
    high: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for JSON."""
        return {"mean": self.mean, "std": self.std, "runs": self.num_runs, "low": self.low, "high": self.high}


def spread(values: Sequence[float], interval: tuple[float, float] | None = None) -> Spread | None:
    """Compute mean and standard deviation (n - 1) over runs; None without finite values."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return None
    std = statistics.stdev(known) if len(known) > 1 else 0.0
    low, high = interval or (None, None)
    return Spread(math.fsum(known) / len(known), std, len(known), low, high)


def pooled_interval(runs: Sequence[Outcomes]) -> tuple[float, float]:
    """Compute the 95 % interval of a rate over all runs. An undecided outcome counts as no hit at the lower end and as
    a hit at the upper end. ValueError without outcomes."""
    low = _interval([{key: bool(hit) for key, hit in run.items()} for run in runs])[0]
    high = _interval([{key: hit is None or hit for key, hit in run.items()} for run in runs])[1]
    return low, high


def _interval(runs: Sequence[Mapping[Hashable, bool]]) -> tuple[float, float]:
    prompts: dict[Hashable, list[bool]] = {}
    for run in runs:
        for key, hit in run.items():
            prompts.setdefault(key, []).append(hit)
    hits, trials = [sum(found) for found in prompts.values()], [len(found) for found in prompts.values()]
    n, total = len(prompts), sum(trials)
    if not total:
        raise ValueError("a pooled interval needs outcomes")
    p = sum(hits) / total
    effect = float(len(runs))
    if 0 < p < 1 and n > 1:
        variance = n / (n - 1) * math.fsum((h - p * m) ** 2 for h, m in zip(hits, trials, strict=True)) / total**2
        effect = min(max(1.0, variance / (p * (1 - p) / total)), effect)
    return score_interval(p, total / effect)


def score_interval(share: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `n` trials, which need not be a whole number."""
    z2 = Z95 * Z95
    centre, half = share + z2 / (2 * n), Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low, high = (centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)
    return (0.0 if share == 0 else max(0.0, low)), (1.0 if share == 1 else min(1.0, high))


def paired_p_value(ours: Mapping[Any, Outcomes], baseline: Mapping[Any, Outcomes]) -> float | None:
    """Test that two cells have the same rate on the same prompts and seeds; None where they share none.

    A prompt's difference is summed over the seeds that both have, so that what belongs together stays one difference;
    the test is the exact sign-flip test over prompts (`sign_test`), McNemar's for one seed. ours, baseline: outcomes by
    seed.
    """
    totals: dict[Hashable, int] = {}
    for seed in ours.keys() & baseline.keys():
        for key, hit in ours[seed].items():
            other = baseline[seed].get(key)
            if hit is not None and other is not None:
                totals[key] = totals.get(key, 0) + int(hit) - int(other)
    return sign_test(list(totals.values())) if totals else None
