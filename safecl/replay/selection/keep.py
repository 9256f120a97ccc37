"""The choice of rows that stay when the memory is full. It does not depend on how rows are split over calls or ranks.

Every policy is one rule. Rows have a priority, rows of a category share a quota, and a category keeps, in the order of
priority, as many rows as fit into its quota without a gap:

    reservoir   one category; priority = hash(seed, position): the k smallest of n independent uniform numbers are a
                uniform sample of k rows (bottom-k sampling: Cohen and Kaplan 2007, PODC)
    balanced    quota = min(what the category offered, level), with the level at which the quotas fill the capacity
    fifo        one category; the latest position first

A dropped row has a priority beyond the cut and can never return, because quotas only shrink as rows arrive. So the rule
needs no dropped rows, and its outcome depends only on the set of rows seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from safecl.config import MemoryConfig, parse_bytes
from safecl.replay.files.hashing import name_key, priority_of

_LAST = 2**64 - 1


@dataclass
class Keeper:
    """The rule and its state.

    capacity: rows, or bytes with `in_bytes`. seen: amount (rows or bytes) seen per category. cuts: per category, the
    first priority that did not fit.
    """

    policy: str
    capacity: int
    in_bytes: bool
    seed: int
    seen: dict[str, int] = field(default_factory=dict)
    cuts: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: MemoryConfig, seed: int) -> Keeper:
        if isinstance(config.capacity, str):
            return cls(config.policy, parse_bytes(config.capacity), True, seed)
        return cls(config.policy, config.capacity, False, seed)

    def category(self, group: str) -> str:
        """Return the category of a group's rows: only the balanced policy tells groups apart."""
        return group if self.policy == "balanced" else ""

    def priorities(self, positions: np.ndarray) -> np.ndarray:
        """Return a priority per position, uint64; the smallest stay."""
        positions = np.asarray(positions, np.uint64)
        return np.uint64(_LAST - 1) - positions if self.policy == "fifo" else priority_of(positions, self.seed)

    def total(self, nbytes: np.ndarray) -> int:
        """Return how much of the capacity all rows together take."""
        return int(nbytes.sum(dtype=np.int64)) if self.in_bytes else len(nbytes)

    def amounts(self, nbytes: np.ndarray) -> np.ndarray:
        """Return how much of the capacity each row takes, int64."""
        return nbytes.astype(np.int64) if self.in_bytes else np.ones(len(nbytes), np.int64)

    def admits(self, priorities: np.ndarray, categories: list[str]) -> np.ndarray:
        """Return which rows may enter, bool per row: False where a row lies beyond its category's cut."""
        if not self.cuts:
            return np.ones(len(priorities), bool)
        return priorities < np.array([self.cuts.get(category, _LAST) for category in categories], np.uint64)

    def count(self, category: str, amount: int) -> None:
        """Count rows that were seen."""
        self.seen[category] = self.seen.get(category, 0) + amount

    def quotas(self) -> dict[str, int]:
        """Return the amount that each category may keep.

        The remainder after equal shares goes to the first large categories by the hash of their names.
        """
        if self.policy != "balanced":
            return {"": self.capacity}
        left = self.capacity
        quotas: dict[str, int] = {}
        for place, (seen, category) in enumerate(sorted((seen, category) for category, seen in self.seen.items())):
            share = left // (len(self.seen) - place)
            if seen > share:
                large = [c for c in self.seen if c not in quotas]
                extra = left - share * len(large)
                by_hash = sorted(large, key=lambda c: (name_key(f"{self.seed} {c}"), c))
                return quotas | {c: share + (i < extra) for i, c in enumerate(by_hash)}
            quotas[category] = seen
            left -= seen
        return quotas

    def survivors(
        self, positions: np.ndarray, nbytes: np.ndarray, categories: np.ndarray, names: list[str]
    ) -> np.ndarray:
        """Return which of all rows held stay, bool [rows], and move the cuts. `categories` numbers each row's category
        in `names`."""
        priorities, amounts = self.priorities(positions), self.amounts(nbytes)
        keep = np.zeros(len(positions), bool)
        quotas = self.quotas()
        for number, name in enumerate(names):
            rows = np.flatnonzero(categories == number)
            rows = rows[np.argsort(priorities[rows])]
            fits = np.cumsum(amounts[rows]) <= quotas.get(name, 0)
            keep[rows[fits]] = True
            if not fits.all():
                self.cuts[name] = min(self.cuts.get(name, _LAST), int(priorities[rows[~fits]][0]))
        return keep

    def to_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "cuts": self.cuts}

    def load(self, state: Mapping[str, Any]) -> None:
        self.seen, self.cuts = dict(state["seen"]), dict(state["cuts"])
