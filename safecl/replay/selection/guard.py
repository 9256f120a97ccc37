"""Guarded insertion: a row that is an outlier under the aligned model, or that a scorer flags, stays out of the memory.

What "outlier" means is measured on the memory itself: median and MAD (scaled by 1.4826, so that it estimates a standard
deviation) of the rows' mean NLL under the aligned model. They are taken anew when the number of rows seen reaches 16,
32, ..., 512, and then every 1,024 rows: at fixed places of the stream, so that the outcome does not depend on the
portions in which rows arrive.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from safecl.config import GuardConfig

FIRST, EVERY = 16, 1024
MAD_TO_DEVIATION = 1.4826


def next_refresh(num_seen: int) -> int:
    """The next number of rows seen at which the statistics are taken."""
    if num_seen >= EVERY // 2:
        return (num_seen // EVERY + 1) * EVERY
    return max(FIRST, 1 << num_seen.bit_length())


class Guard:
    """Judges rows by their tags and by their NLL under the aligned model; counts what it kept out, by reason."""

    def __init__(self, config: GuardConfig | None):
        self.config = config
        self.median = self.deviation = float("nan")
        self.kept_out: Counter[str] = Counter()

    @property
    def takes_statistics(self) -> bool:
        """True where rows are compared with the memory's own."""
        return self.config is not None and self.config.max_deviations is not None

    def reason(self, nll: float, tags: Mapping[str, str]) -> str | None:
        """Why a row stays out, None where it may come in. nll in nats per token, NaN where unknown."""
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
        """bool per row: further from the median than allowed. False as long as there are no statistics."""
        if not self.takes_statistics or np.isnan(self.median):
            return np.zeros(len(nlls), bool)
        return np.abs(nlls - self.median) > self.config.max_deviations * self.deviation

    def refresh(self, nlls: np.ndarray) -> np.ndarray:
        """Takes the statistics of the rows held; returns which of them are outliers, bool [rows]."""
        known = nlls[~np.isnan(nlls)].astype(np.float64)
        if not self.takes_statistics or len(known) < FIRST // 2:
            return np.zeros(len(nlls), bool)
        self.median = float(np.median(known))
        # rows that are all alike still differ by rounding
        self.deviation = max(float(np.median(np.abs(known - self.median))) * MAD_TO_DEVIATION, 1e-3)
        outliers = self.outliers(nlls)
        if outliers.any():
            self.kept_out[self._outlier_name()] += int(outliers.sum())
        return outliers

    def _outlier_name(self) -> str:
        return f"loss more than {self.config.max_deviations:g} deviations from the median"

    def to_dict(self) -> dict:
        known = not np.isnan(self.median)
        return {
            "median": self.median if known else None,
            "deviation": self.deviation if known else None,
            "kept_out": dict(self.kept_out),
        }

    def load(self, state: dict) -> None:
        self.median, self.deviation = (float("nan") if state[k] is None else state[k] for k in ("median", "deviation"))
        self.kept_out = Counter(state["kept_out"])
