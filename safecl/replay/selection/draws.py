"""The draw of a step: classes of rows, how often each is visited, and the layout in which visits find them.

    uniform     one class: every row is equally likely
    balanced    one class per category (task, source, or a tag), all equally likely, or by their shares
    loss_aware  one class; a visited row is taken with a chance that grows with its last loss
    mix_cd      one class per category and bin of loss, in proportion to rows x estimated rate of damage

With `rest_steps` r every row belongs to one of r + 1 cohorts by a hash of its position, and step t draws only from
cohort t mod (r + 1), so a row rests at least r steps. A memory that is too small for that rests its rows for fewer
steps: a cohort holds at least two draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from safecl.config import MemoryConfig
from safecl.replay.files.hashing import cohort_of
from safecl.replay.files.table import RowTable
from safecl.replay.selection import visits
from safecl.replay.selection.scores import LAG, NUM_BINS, ScoreLog, loss_bins

SMALLEST_COHORT_DRAWS = 2


@dataclass
class Classes:
    """names: one per class, the same on every rank and in every run. of_row: int32 [rows], numbering them."""

    names: list[str]
    of_row: np.ndarray


class Drawer:
    """Draws from a table by the configured policy. Layouts are cached until rows are added or dropped.

    A draw has as many rows as hold `num_tokens` on average, by the mean length of the classes that are drawn (float64
    [classes]).
    """

    def __init__(self, config: MemoryConfig, seed: int):
        self.policy, self.shares = config.drawn_by, config.shares
        self.rest_steps, self.seed = config.rest_steps, seed
        self.scores = ScoreLog(config.damage_margin)
        self._version = -1
        self._layouts: dict[tuple[int, int], visits.RowLayout] = {}
        self._classes = Classes([], np.zeros(0, np.int64))
        self._mean_lengths, self._num_tokens = np.zeros(0), 0

    @property
    def uses_scores(self) -> bool:
        """True where draws depend on logged losses."""
        return self.policy in ("loss_aware", "mix_cd")

    def draw(self, table: RowTable, groups: list[str], step: int, num_tokens: int, stream: str) -> np.ndarray:
        """Return the row numbers of a draw, int64 [n], in the order of the visits. groups: category of each label."""
        self._follow(table, groups)
        if self.uses_scores:
            self.scores.use_until(step - LAG, table, self._classes.of_row, self._classes.names)
        if len(table) == 0:
            return np.zeros(0, np.int64)
        num_cohorts = self.num_cohorts(num_tokens)
        layout = self._layout(table, num_cohorts, num_tokens)
        weights = np.zeros((len(self._classes.names), num_cohorts))
        weights[:, step % num_cohorts] = self._weights(layout, num_cohorts)[:, step % num_cohorts]
        chances = (lambda rows: self.scores.chances(rows, table)) if self.policy == "loss_aware" else None
        key = visits.draw_key(self.seed, stream, step)
        by_class = weights.sum(1)
        mean_length = float(by_class @ self._mean_lengths / by_class.sum()) if by_class.any() else 1.0
        return visits.take_rows(
            layout, weights.reshape(-1), visits.num_rows_for(num_tokens, mean_length, key), key, chances
        )

    def log(self, table: RowTable, groups: list[str], step: int, keys: np.ndarray, losses: np.ndarray) -> None:
        """Log losses of rows; see ScoreLog.log."""
        self.scores.log(step, keys, losses)
        if not self.uses_scores:
            self._follow(table, groups)
            self.scores.use_until(step, table, self._classes.of_row, self._classes.names)
            self.scores.last_step = -(2**31)

    def num_cohorts(self, num_tokens: int) -> int:
        """Return the number of cohorts for draws of `num_tokens` tokens; 1 where rows do not rest."""
        if self.rest_steps == 0 or num_tokens < 1:
            return 1
        draws = self._num_tokens // (SMALLEST_COHORT_DRAWS * num_tokens)
        return max(1, min(self.rest_steps + 1, draws))

    def _follow(self, table: RowTable, groups: list[str]) -> None:
        if self._version != table.version:
            self._version = table.version
            self._layouts.clear()
            self._classes = self._classify(table, groups)
            rows = np.bincount(self._classes.of_row, minlength=len(self._classes.names))
            tokens = np.bincount(self._classes.of_row, table["length"], minlength=len(self._classes.names))
            self._mean_lengths, self._num_tokens = tokens / np.maximum(rows, 1), int(tokens.sum())

    def _classify(self, table: RowTable, groups: list[str]) -> Classes:
        if self.policy not in ("balanced", "mix_cd"):
            return Classes([""], np.broadcast_to(np.int32(0), len(table)))
        names = sorted(set(groups))
        number = np.array([names.index(group) for group in groups], np.int32)
        of_row = number[table["label"]] if len(table) else np.zeros(0, np.int32)
        if self.policy == "balanced":
            return Classes(names, of_row)
        binned = [f"{name} / {bin_}" for name in names for bin_ in range(NUM_BINS + 1)]
        return Classes(binned, of_row * (NUM_BINS + 1) + loss_bins(table["prior_nll"]).astype(np.int32))

    def _layout(self, table: RowTable, num_cohorts: int, num_tokens: int) -> visits.RowLayout:
        strips = visits.num_strips_for(num_tokens * len(table) / max(1, self._num_tokens))
        if (num_cohorts, strips) not in self._layouts:
            classes = self._classes.of_row
            if num_cohorts > 1:
                classes = classes * num_cohorts + cohort_of(table["position"], self.seed, num_cohorts)
            num_classes = len(self._classes.names) * num_cohorts
            if len(self._layouts) > 1:  # draws of one run hardly differ in size; each layout is 4 bytes a row
                self._layouts.clear()
            self._layouts[num_cohorts, strips] = visits.lay_out(
                classes, num_classes, table["shard"], table["length"], strips
            )
        return self._layouts[num_cohorts, strips]

    def _weights(self, layout: visits.RowLayout, num_cohorts: int) -> np.ndarray:
        """Return the weight of every class in every cohort; float64 [classes, cohorts]."""
        sizes = layout.sizes.reshape(-1, num_cohorts).astype(np.float64)
        if self.policy == "balanced":
            present = (sizes > 0).astype(np.float64)
            weights = present * self._shares()[:, None]
            return np.where(weights.any(0), weights, present)  # a cohort may hold only rows that have no share
        if self.policy == "mix_cd":
            return sizes * self.scores.damage_rates(self._classes.names)[:, None]
        return sizes

    def _shares(self) -> np.ndarray:
        """Return the chance of every class; float64 [classes]. Classes without a share of their own share the rest."""
        names = self._classes.names
        others = sum(name not in self.shares for name in names)
        rest = max(0.0, 1.0 - sum(self.shares.values())) / max(1, others)
        return np.array([self.shares.get(name, rest) for name in names]) if self.shares else np.ones(len(names))
