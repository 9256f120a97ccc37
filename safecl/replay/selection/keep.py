"""Which rows stay when the memory is full: the same rows in whatever portions and on however many ranks they were
inserted.

Every policy is one rule. Rows have a priority, rows of a category share a quota, and a category keeps, in the order of
priority, as many rows as fit into its quota without a gap:

    reservoir   one category; priority = hash(seed, position): the k smallest of n independent uniform numbers are a uniform sample of
                k rows (bottom-k sampling: Cohen and Kaplan 2007, PODC)
    balanced    quota = min(what the category offered, level), with the level at which the quotas fill the capacity
    fifo        one category; the latest position first

What was left out once has a priority beyond the cut and can never come back, because quotas only shrink as rows arrive.
So the rule needs no rows that are gone, and its outcome depends on the set of rows seen alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from safecl.config import MemoryConfig, parse_bytes
from safecl.replay.files.hashing import name_key, priority_of

_LAST = 2**64 - 1


@dataclass
class Keeper:
    """The rule with what it must remember: per category the amount seen (rows or bytes) and the first priority that did
    not fit."""

    policy: str
    capacity: int
    in_bytes: bool
    seed: int
    seen: dict[str, int] = field(default_factory=dict)
    cuts: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: MemoryConfig, seed: int) -> Keeper:
        in_bytes = isinstance(config.capacity, str)
        return cls(config.policy, parse_bytes(config.capacity) if in_bytes else config.capacity, in_bytes, seed)

    def category(self, group: str) -> str:
        """The category of rows of a group: groups are told apart by the balanced policy only."""
        return group if self.policy == "balanced" else ""

    def priorities(self, positions: np.ndarray) -> np.ndarray:
        """uint64 per position; the smallest stay."""
        positions = np.asarray(positions, np.uint64)
        return np.uint64(_LAST - 1) - positions if self.policy == "fifo" else priority_of(positions, self.seed)

    def total(self, nbytes: np.ndarray) -> int:
        """What all rows together take of the capacity."""
        return int(nbytes.sum(dtype=np.int64)) if self.in_bytes else len(nbytes)

    def amounts(self, nbytes: np.ndarray) -> np.ndarray:
        """What rows take of the capacity; int64."""
        return nbytes.astype(np.int64) if self.in_bytes else np.ones(len(nbytes), np.int64)

    def admits(self, priorities: np.ndarray, categories: list[str]) -> np.ndarray:
        """bool per row: False where the row can be told to stay out already."""
        if not self.cuts:
            return np.ones(len(priorities), bool)
        return priorities < np.array([self.cuts.get(category, _LAST) for category in categories], np.uint64)

    def count(self, category: str, amount: int) -> None:
        """Remembers that a row was seen."""
        self.seen[category] = self.seen.get(category, 0) + amount

    def quotas(self) -> dict[str, int]:
        """What each category may keep.

        The rows that remain after equal shares go to the first large categories by the hash of their names.
        """
        if self.policy != "balanced":
            return {"": self.capacity}
        left, quotas = self.capacity, {}
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
        """bool [rows]: who stays of all rows held; moves the cuts. `categories` numbers each row's category in
        `names`."""
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

    def to_dict(self) -> dict:
        return {"seen": self.seen, "cuts": self.cuts}

    def load(self, state: dict) -> None:
        self.seen, self.cuts = dict(state["seen"]), dict(state["cuts"])
