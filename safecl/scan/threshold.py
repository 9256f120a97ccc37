"""The threshold of the screen: rows with a higher score are flagged.

With scores b_1 <= ... <= b_n of known harmless rows (`scan.benign`) it is a conformal quantile (Vovk et al. 2005):

    t = b_k,  k = ceil((n + 1) (1 - alpha))

A further harmless row of the same kind is flagged with probability (n + 1 - k) / (n + 1) <= alpha, for any
distribution; n must be at least 1 / alpha - 1. The number of flagged rows among N harmless ones follows
BetaBinomial(N, n + 1 - k, k). Harmless rows do not explain more flags than its 99.9 % quantile.

Without such rows the upload U is modelled as a mixture of harmless rows and a share pi of rows like the known
disallowed prompts D:

    S_U = (1 - pi) S_clean + pi S_D,        S(t) = share of scores >= t
    pi = median over the quantiles .3 to .7 of D of S_U / S_D        harmless rows hardly score there
    t = the lowest score down to which (S_U - pi S_D) / (1 - pi) <= alpha

but never above the 10 % quantile of D: inside the bulk of D the difference of two noisy shares says nothing. Where
harmless rows score as high as that, more than alpha of them are flagged, and the result holds an estimate of their
share. Even a robust quantile of the upload alone would fail: refusal scores are skewed and end at 0, so that
median + z MAD lies above every score on some data sets, and wherever 10 % of the rows are poisoned.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from safecl.scan.known import check_number_of_benign
from safecl.scan.scores import DIGITS

CONFIDENCE = 0.999
MOST_MISSED = 0.1
_PLACES = (0.3, 0.4, 0.5, 0.6, 0.7)


@dataclass(frozen=True)
class Threshold:
    """A threshold: rows that score above `value` are flagged.

    source: "benign" or "upload". false_alarm: flagged share of harmless rows, as a bound ("benign") or an estimate
    ("upload"). caught: share of the known disallowed prompts above the threshold; None where none are known.
    most_expected: number of flags that harmless rows alone exceed with probability 0.1 %; None for "upload".
    poisoned: estimated share of rows like the known disallowed prompts; None for "benign".
    """

    value: float
    source: str
    false_alarm: float
    caught: float | None = None
    most_expected: int | None = None
    poisoned: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def threshold_from_benign(
    benign: np.ndarray, num_rows: int, alpha: float, disallowed: np.ndarray | None = None
) -> Threshold:
    """Compute the conformal threshold for an upload of `num_rows` rows from benign scores, fp64 [n].

    Raises: ConfigError where there are too few benign scores for `alpha`.
    """
    n = len(benign)
    k = math.ceil((n + 1) * (1 - alpha) - 1e-9)
    check_number_of_benign(n, alpha)
    value = float(np.sort(benign)[k - 1])
    caught = float((disallowed > value).mean()) if disallowed is not None and len(disallowed) else None
    most_expected = beta_binomial_quantile(num_rows, n + 1 - k, k, CONFIDENCE)
    return Threshold(value, "benign", (n + 1 - k) / (n + 1), caught, most_expected)


def threshold_from_upload(upload: np.ndarray, disallowed: np.ndarray, alpha: float) -> Threshold:
    """Estimate the threshold from the upload's own scores and those of known disallowed prompts, fp64 [rows] each."""
    falling = np.sort(upload)[::-1]
    share_upload = np.arange(1, len(falling) + 1) / len(falling)
    share_disallowed = _share_at_least(disallowed, falling)
    pi = poisoned_share(upload, disallowed)
    if (1.0 - pi) * len(upload) < 1.0:  # by the estimate no row is harmless, so no flag is a false alarm
        clean = np.zeros(len(falling))
    else:
        clean = np.clip((share_upload - pi * share_disallowed) / (1.0 - pi), 0.0, 1.0)
    highest = falling[np.argmax(clean > alpha)] if (clean > alpha).any() else np.inf
    value = min(highest, np.quantile(disallowed, MOST_MISSED).round(DIGITS))
    flagged = int((upload > value).sum())
    estimated = float(clean[flagged - 1]) if flagged else 0.0
    return Threshold(float(value), "upload", estimated, float((disallowed > value).mean()), None, pi)


def poisoned_share(upload: np.ndarray, disallowed: np.ndarray) -> float:
    """Estimate the share of the upload that scores like the known disallowed prompts, in [0, 1]."""
    at = np.quantile(disallowed, _PLACES)
    return float(min(1.0, np.median(_share_at_least(upload, at) / _share_at_least(disallowed, at))))


def _share_at_least(scores: np.ndarray, at: np.ndarray) -> np.ndarray:
    return 1.0 - np.searchsorted(np.sort(scores), at, side="left") / len(scores)


def beta_binomial_quantile(trials: int, a: float, b: float, level: float) -> int:
    """Return the smallest m with P(X <= m) >= level, for X ~ Binomial(trials, p), p ~ Beta(a, b)."""
    counts = np.arange(trials + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, trials + 1)))])
    log_choose = log_factorial[-1] - log_factorial - log_factorial[::-1]
    # Beta(m + a, N - m + b) / Beta(a, b) by its recursion in m.
    steps = np.log(counts[:-1] + a) - np.log(trials - counts[:-1] - 1 + b)
    start = math.lgamma(trials + b) + math.lgamma(a + b) - math.lgamma(b) - math.lgamma(trials + a + b)
    log_p = log_choose + start + np.concatenate([[0.0], np.cumsum(steps)])
    return int(np.searchsorted(np.cumsum(np.exp(log_p)), level))
