"""The score log: the model's losses on replayed rows, and the draw policies that use them.

A replayed row goes through the model anyway, so its loss costs nothing. The ranks' losses are gathered once at the
step's end and logged on every rank (12 bytes a row: key and loss). Draws of step t use the losses of steps up to t - 2.
So the rows of a step can be fetched while the step before it still computes, and a draw is a function of (seed, step,
log).

    loss_aware   chance of a row proportional to its last loss, between 0.1 and 4 times the mean; rows without a loss
                 count as the mean
    mix_cd       (Bai, Yeh, Hsieh and Taly 2024, arXiv 2402.08096) rows fall into bins by category and by their loss
                 under the aligned model. A row is damaged when its loss has risen by more than a margin. A bin's rate
                 of damage is estimated from its replayed rows, and bins are drawn in proportion to (rows in the bin)
                 x (rate)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from safecl.replay.files.table import RowTable
from safecl.replay.rows import ReplayError

LAG = 2
LOWEST, HIGHEST = 0.1, 4.0

# Bins of equally many rows by loss under the aligned model; rows whose loss is unknown have a bin of their own.
NUM_BINS = 4
# A count halves in 69 steps: rates follow the model, and still average over a few hundred rows.
DECAY = 0.99


@dataclass
class ScoreLog:
    """Losses logged per step, and the statistics derived from them.

    last_step: losses of steps up to here are in the table's `score` and in `counts`. pending: (step, keys, losses) of
    later steps. counts: [damaged, replayed] by bin, decayed. mean: that of all rows' last losses, nats.
    """

    damage_margin: float
    last_step: int = -(2**31)
    pending: list[tuple[int, np.ndarray, np.ndarray]] = field(default_factory=list)
    counts: dict[str, list[float]] = field(default_factory=dict)
    mean: float = float("nan")

    def log(self, step: int, keys: np.ndarray, losses: np.ndarray) -> None:
        """Add the losses of a step's rows, in any order. Raises ReplayError where draws already used this step's
        losses."""
        if step <= self.last_step:
            raise ReplayError(
                f"losses of step {step} come too late: rows of step {self.last_step + LAG} were drawn without them"
            )
        losses = np.asarray(losses, np.float32)
        order = np.lexsort((losses, keys))
        finite = np.isfinite(losses[order])
        self.pending.append((step, np.asarray(keys, np.uint64)[order][finite], losses[order][finite]))
        self.pending.sort(key=lambda entry: entry[0])

    def use_until(self, step: int, table: RowTable, bins: np.ndarray, names: list[str]) -> None:
        """Apply the losses of steps up to `step`. bins: int [rows], numbering `names`."""
        if step < self.last_step:
            used = f"losses of step {self.last_step} are in use"
            raise ReplayError(f"rows of step {step + LAG} cannot be drawn any more: {used}; draw in order")
        while self.pending and self.pending[0][0] <= step:
            self._use(*self.pending.pop(0)[1:], table, bins, names)
        self.last_step = step

    def _use(self, keys: np.ndarray, losses: np.ndarray, table: RowTable, bins: np.ndarray, names: list[str]) -> None:
        held = np.isin(keys, table["position"])
        keys, losses = keys[held], losses[held]
        rows = table.find(keys)
        table.own()
        self._count(rows, losses, table, bins, names)
        table["score"][rows] = losses
        known = table["score"][~np.isnan(table["score"])]
        self.mean = float(known.mean(dtype=np.float64)) if len(known) else float("nan")

    def _count(self, rows: np.ndarray, losses: np.ndarray, table: RowTable, bins: np.ndarray, names: list[str]) -> None:
        """Count damaged rows per bin. A row without a loss under the aligned model is compared with its first logged
        loss."""
        first = table["first_score"]
        first[rows] = np.where(np.isnan(first[rows]), losses, first[rows])
        before = np.where(np.isnan(table["prior_nll"][rows]), first[rows], table["prior_nll"][rows])
        damaged = losses > before + self.damage_margin
        for count in self.counts.values():
            count[0], count[1] = count[0] * DECAY, count[1] * DECAY
        for number in np.unique(bins[rows]):
            count = self.counts.setdefault(names[number], [0.0, 0.0])
            of_bin = bins[rows] == number
            count[0] += float(damaged[of_bin].sum())
            count[1] += float(of_bin.sum())

    def damage_rates(self, names: list[str]) -> np.ndarray:
        """Estimate the share of damaged rows per bin, (damaged + 1) / (replayed + 2): 1/2 for a bin never replayed."""
        counts = np.array([self.counts.get(name, (0.0, 0.0)) for name in names]).reshape(-1, 2)
        return (counts[:, 0] + 1) / (counts[:, 1] + 2)

    def chances(self, rows: np.ndarray, table: RowTable) -> np.ndarray:
        """Return the chance of rows under loss_aware, relative to the largest possible; float64 [n], 1 while nothing is
        logged."""
        if not self.mean > 0:
            return np.ones(len(rows))
        score = table["score"][rows].astype(np.float64)
        return np.clip(np.where(np.isnan(score), self.mean, score) / self.mean, LOWEST, HIGHEST) / HIGHEST

    def to_dict(self) -> dict[str, Any]:
        return {
            "last_step": self.last_step,
            "pending": [[step, keys.tolist(), losses.astype(float).tolist()] for step, keys, losses in self.pending],
            "counts": self.counts,
            "mean": None if np.isnan(self.mean) else self.mean,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.last_step, self.counts = state["last_step"], {name: list(count) for name, count in state["counts"].items()}
        self.pending = [
            (step, np.array(keys, np.uint64), np.array(losses, np.float32)) for step, keys, losses in state["pending"]
        ]
        self.mean = float("nan") if state["mean"] is None else state["mean"]


def loss_bins(prior: np.ndarray) -> np.ndarray:
    """Return each row's bin by its loss under the aligned model: 0 .. 3 equally full, 4 where unknown; int64 [rows]."""
    known = ~np.isnan(prior)
    bins = np.full(len(prior), NUM_BINS, np.int64)
    if known.any():
        edges = np.quantile(prior[known], np.arange(1, NUM_BINS) / NUM_BINS)
        bins[known] = np.searchsorted(edges, prior[known], side="right")
    return bins
