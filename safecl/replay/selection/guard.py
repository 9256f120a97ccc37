"""Guarded insertion: keep a row out of the memory if it is an outlier under the aligned model, or if a scorer flags it.

An outlier lies far from the memory's own rows: far from the median of their mean NLL under the aligned model, in units
of the MAD (scaled by 1.4826, so that it estimates a standard deviation). Both are computed again when the number of
rows seen reaches 16, 32, ..., 512, and then every 1,024 rows: at fixed positions of the stream, so that the outcome
does not depend on how the rows are split over calls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from safecl.config import GuardConfig

FIRST, EVERY = 16, 1024
MAD_TO_DEVIATION = 1.4826


def next_refresh(num_seen: int) -> int:
    """Return the next number of rows seen at which the statistics are computed."""
    if num_seen >= EVERY // 2:
        return (num_seen // EVERY + 1) * EVERY
    return max(FIRST, 1 << num_seen.bit_length())


class Guard:
    """Judges rows by their tags and by their NLL under the aligned model, and counts the refused rows by reason."""

    def __init__(self, config: GuardConfig | None):
        self.config = config
        self.median = self.deviation = float("nan")
        self.kept_out: Counter[str] = Counter()

    @property
    def takes_statistics(self) -> bool:
        """True where rows are compared with the memory's own."""
        return self._max_deviations is not None

    @property
    def _max_deviations(self) -> float | None:
        return None if self.config is None else self.config.max_deviations

    def reason(self, nll: float, tags: Mapping[str, str]) -> str | None:
        """Return why a row stays out, None where it may enter. nll: nats per token, NaN where unknown."""
        config = self.config
        if config is None:
            return None
        if config.flag_tag is not None and str(tags.get(config.flag_tag, "")).strip().lower() not in (
            "",
            "0",
            "false",
            "no",
            "none",
        ):
            return f"flagged: {config.flag_tag}"
        if config.max_nll is not None and nll > config.max_nll:
            return f"loss above {config.max_nll:g} nats"
        return self._outlier_name() if self.outliers(np.array([nll]))[0] else None

    def outliers(self, nlls: np.ndarray) -> np.ndarray:
        """Return which rows lie further from the median than allowed, bool per row; all False without statistics."""
        limit = self._max_deviations
        if limit is None or np.isnan(self.median):
            return np.zeros(len(nlls), bool)
        return np.abs(nlls - self.median) > limit * self.deviation

    def refresh(self, nlls: np.ndarray) -> np.ndarray:
        """Compute the statistics from the rows held. Returns which of them are outliers, bool [rows]."""
        known = nlls[~np.isnan(nlls)].astype(np.float64)
        if not self.takes_statistics or len(known) < FIRST // 2:
            return np.zeros(len(nlls), bool)
        self.median = float(np.median(known))
        # equal rows still differ by rounding
        self.deviation = max(float(np.median(np.abs(known - self.median))) * MAD_TO_DEVIATION, 1e-3)
        outliers = self.outliers(nlls)
        if outliers.any():
            self.kept_out[self._outlier_name()] += int(outliers.sum())
        return outliers

    def _outlier_name(self) -> str:
        return f"loss more than {self._max_deviations:g} deviations from the median"

    def to_dict(self) -> dict[str, Any]:
        known = not np.isnan(self.median)
        return {
            "median": self.median if known else None,
            "deviation": self.deviation if known else None,
            "kept_out": dict(self.kept_out),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.median, self.deviation = (float("nan") if state[k] is None else state[k] for k in ("median", "deviation"))
        self.kept_out = Counter(state["kept_out"])
