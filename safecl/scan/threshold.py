"""From which score on a row is flagged. Flagged is what scores above the threshold.

With scores b_1 <= ... <= b_n of known harmless rows (`scan.benign`) it is a conformal quantile (Vovk et al. 2005):

    t = b_k,  k = ceil((n + 1) (1 - alpha))

A further harmless row of the same kind is flagged with probability (n + 1 - k) / (n + 1) <= alpha, whatever the
distribution; n must be at least 1 / alpha - 1. How many of N harmless rows are flagged is BetaBinomial(N, n + 1 - k,
k); more than its 99.9 % quantile are not explained by harmless rows.

Without them the upload U is taken for a mixture of harmless rows and a share pi of rows like the known disallowed
prompts D:

    S_U = (1 - pi) S_clean + pi S_D,        S(t) = share of scores >= t
    pi = median over the quantiles .3 to .7 of D of S_U / S_D        harmless rows hardly score there
    t = the lowest score down to which (S_U - pi S_D) / (1 - pi) <= alpha

but never above the 10 % quantile of D: inside the bulk of D the difference of two noisy shares says nothing. Where
harmless rows score as high as that, more than alpha of them are flagged; the estimate of how many is part of the
result. A quantile of the upload alone, however robust, would not do: refusal scores are skewed and end at 0, so median
+ z MAD lies above every score on some data sets, and where 10 % are poisoned.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from safecl.config import ConfigError
from safecl.scan.scores import DIGITS

CONFIDENCE = 0.999
MOST_MISSED = 0.1
_PLACES = (0.3, 0.4, 0.5, 0.6, 0.7)


@dataclass(frozen=True)
class Threshold:
    """Rows that score above `value` are flagged.

    source: "benign" or "upload". false_alarm: share of harmless rows that is flagged, by construction ("benign") or
    estimated ("upload"). caught: share of the known disallowed prompts above the threshold; None where none are known.
    most_expected: of N rows that are all harmless, hardly ever (0.1 %) more are flagged; None for "upload". poisoned:
    estimated share of rows like the known disallowed prompts.
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
    """The conformal threshold for an upload of `num_rows` rows. Raises ConfigError where there are too few benign
    scores for `alpha`."""
    n = len(benign)
    k = math.ceil((n + 1) * (1 - alpha) - 1e-9)
    if k > n:
        raise ConfigError(
            f"scan.benign: {n} rows cannot give a false alarm rate of {alpha:g}; at least {math.ceil(1 / alpha - 1e-9) - 1} are needed, "
            f"or scan.false_alarm: {math.ceil(1e4 / (n + 1)) / 1e4:g}"
        )
    value = float(np.sort(benign)[k - 1])
    caught = float((disallowed > value).mean()) if disallowed is not None and len(disallowed) else None
    return Threshold(
        value, "benign", (n + 1 - k) / (n + 1), caught, beta_binomial_quantile(num_rows, n + 1 - k, k, CONFIDENCE)
    )


def threshold_from_upload(upload: np.ndarray, disallowed: np.ndarray, alpha: float) -> Threshold:
    """The threshold from the upload's own scores and those of known disallowed prompts."""
    falling = np.sort(upload)[::-1]
    share_upload = np.arange(1, len(falling) + 1) / len(falling)
    share_disallowed = _share_at_least(disallowed, falling)
    pi = poisoned_share(upload, disallowed)
    if (1.0 - pi) * len(upload) < 1.0:  # by the estimate no row is harmless, so none can be a false alarm
        clean = np.zeros(len(falling))
    else:
        clean = np.clip((share_upload - pi * share_disallowed) / (1.0 - pi), 0.0, 1.0)
    highest = falling[np.argmax(clean > alpha)] if (clean > alpha).any() else np.inf
    value = min(highest, np.quantile(disallowed, MOST_MISSED).round(DIGITS))
    flagged = int((upload > value).sum())
    estimated = float(clean[flagged - 1]) if flagged else 0.0
    return Threshold(float(value), "upload", estimated, float((disallowed > value).mean()), None, pi)


def poisoned_share(upload: np.ndarray, disallowed: np.ndarray) -> float:
    """Estimated share of the upload that scores like the known disallowed prompts, in [0, 1]."""
    at = np.quantile(disallowed, _PLACES)
    return float(min(1.0, np.median(_share_at_least(upload, at) / _share_at_least(disallowed, at))))


def _share_at_least(scores: np.ndarray, at: np.ndarray) -> np.ndarray:
    return 1.0 - np.searchsorted(np.sort(scores), at, side="left") / len(scores)


def beta_binomial_quantile(trials: int, a: float, b: float, level: float) -> int:
    """Smallest m with P(X <= m) >= level, for X ~ Binomial(trials, p), p ~ Beta(a, b)."""
    counts = np.arange(trials + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, trials + 1)))])
    log_choose = log_factorial[-1] - log_factorial - log_factorial[::-1]
    # Beta(m + a, N - m + b) / Beta(a, b) by its recursion in m.
    steps = np.log(counts[:-1] + a) - np.log(trials - counts[:-1] - 1 + b)
    start = math.lgamma(trials + b) + math.lgamma(a + b) - math.lgamma(b) - math.lgamma(trials + a + b)
    log_p = log_choose + start + np.concatenate([[0.0], np.cumsum(steps)])
    return int(np.searchsorted(np.cumsum(np.exp(log_p)), level))
