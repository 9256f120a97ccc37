"""Which rows a draw visits: a net in two dimensions, shifted at random for every (seed, stream, step).

Visit i looks at the point (x_i, y_i) of the Sobol' sequence (x is van der Corput's, together a (0, 2)-net in base 2), both coordinates
XORed with a number drawn from the seed (a digital shift: each point is exactly uniform, the net stays a net). y chooses the class of rows
(by the policy's weights), x the row inside the class. Rows of a class lie in strips of neighbouring shards, by length inside a strip, so

    - the leading bits of x choose the strip: W visits of an aligned run meet each of W ranks once, whatever W = 2, 4, ... is,
    - the remaining bits choose the length, and are the same on all of them: ranks get rows of nearly equal length at the same time.

A visit to a strip is kept with probability (rows of the strip / rows of the fullest strip), which makes all rows of a class equally likely.

Source: Niederreiter 1992, ch. 4; digital shifts: Owen 2003, "Quasi-Monte Carlo sampling", sec. 7.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from safecl.replay.hashing import NUM_GROUPS, NUM_SHARDS, mix, name_key

# Two rows per strip let long and short cancel; more strips than that would make all rows of a small draw equally long.
ROWS_PER_STRIP = 2
# Fuller strips are more alike, so fewer visits are thrown away.
SMALLEST_STRIP = 16
SHARD_BITS = NUM_SHARDS.bit_length() - 1


@dataclass(frozen=True)
class RowLayout:
    """Rows ordered for visiting.

    order: int32 [rows], row numbers by (class, strip, length). strip_bits: int64 [classes], log2 of the class's number of strips.
    first_strip: int64 [classes + 1], into starts. starts: int64 [all strips + 1], into order. largest: int64 [classes], its fullest strip.
    """

    order: np.ndarray
    strip_bits: np.ndarray
    first_strip: np.ndarray
    starts: np.ndarray
    largest: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """Rows per class; int64 [classes]."""
        return np.diff(self.starts[self.first_strip])

    def rows_of(self, chosen: int) -> np.ndarray:
        """Row numbers of a class."""
        return self.order[self.starts[self.first_strip[chosen]] : self.starts[self.first_strip[chosen + 1]]]


def lay_out(classes: np.ndarray, num_classes: int, shards: np.ndarray, lengths: np.ndarray, num_strips: int) -> RowLayout:
    """Sorts rows for visiting. classes, shards: int [rows]; lengths: int [rows], tokens; num_strips: a power of two, at most 64."""
    sizes = np.bincount(classes, minlength=num_classes)
    strips = np.minimum(num_strips, np.maximum(1, sizes // SMALLEST_STRIP))
    bits = np.array([int(n).bit_length() - 1 for n in strips], np.int64)
    first_strip = np.concatenate([[0], np.cumsum(1 << bits)])
    strip = first_strip[classes] + (shards.astype(np.int64) >> (SHARD_BITS - bits[classes]))
    longest = int(lengths.max(initial=0)) + 1
    order = np.argsort(strip * longest + lengths, kind="stable").astype(np.int32)
    counts = np.bincount(strip, minlength=first_strip[-1])
    largest = np.maximum.reduceat(counts, first_strip[:-1])
    return RowLayout(order, bits, first_strip, np.concatenate([[0], np.cumsum(counts)]), largest)


def num_strips_for(num_rows: float) -> int:
    """Strips of shards for draws of about `num_rows` rows: a power of two, at most 64."""
    return 1 << (max(1, min(NUM_GROUPS, int(num_rows / ROWS_PER_STRIP))).bit_length() - 1)


def points(first: int, count: int, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Points first .. first + count - 1 of the shifted net as 32-bit fractions; two uint64 arrays [count]."""
    index = np.arange(first, first + count, dtype=np.uint64)
    x, y = np.zeros_like(index), np.zeros_like(index)
    corput, sobol = 1 << 31, 1 << 31
    for bit in range(int(first + count).bit_length()):
        is_set = (index >> np.uint64(bit)) & np.uint64(1)
        x ^= is_set * np.uint64(corput)
        y ^= is_set * np.uint64(sobol)
        corput >>= 1
        sobol ^= sobol >> 1
    return x ^ np.uint64(key & 0xFFFFFFFF), y ^ np.uint64(key >> 32)


def draw_key(seed: int, stream: str, step: int) -> int:
    """The digital shift of a draw."""
    return int(mix(seed, name_key(stream), step))


def visit(layout: RowLayout, weights: np.ndarray, first: int, count: int, key: int) -> np.ndarray:
    """Row numbers met by visits first .. first + count - 1; int64 [count], -1 where a visit meets nothing. weights: float64 [classes]."""
    x, y = points(first, count, key)
    edges = np.cumsum(weights) / weights.sum()
    chosen = np.searchsorted(edges, y / 2.0**32, side="right")
    chosen = np.minimum(chosen, np.flatnonzero(weights)[-1])  # rounding may leave the last edge a hair below 1
    bits = layout.strip_bits[chosen].astype(np.uint64)
    strip = layout.first_strip[chosen] + (x >> (np.uint64(32) - bits)).astype(np.int64)
    start, size = layout.starts[strip], layout.starts[strip + 1] - layout.starts[strip]
    within = (x << bits) & np.uint64(0xFFFFFFFF)
    rows = layout.order[np.minimum(start + ((within * size.astype(np.uint64)) >> np.uint64(32)).astype(np.int64), len(layout.order) - 1)]
    chance = mix(key, np.arange(first, first + count, dtype=np.uint64)) / 2.0**64
    return np.where(chance * layout.largest[chosen] < size, rows, -1)


def take_rows(layout: RowLayout, weights: np.ndarray, lengths: np.ndarray, num_tokens: int, key: int) -> np.ndarray:
    """Distinct row numbers, visited until they hold `num_tokens` tokens; all rows of the weighted classes where there are not as many.

    The row that reaches the number is taken too: stopping before it would draw long rows less often.
    """
    weights = np.where(layout.sizes > 0, weights, 0.0)
    if not weights.any():
        return np.zeros(0, np.int64)
    available = int(layout.sizes[weights > 0].sum())
    mean_length = max(1.0, float(lengths.mean()))
    count = int(num_tokens / mean_length * 1.25) + 8
    met, first, limit = np.zeros(0, np.int64), 0, 64 * available
    while True:
        rows = visit(layout, weights, first, count, key)
        rows = rows[rows >= 0]
        met, first = _distinct(np.concatenate([met, rows])), first + count
        reached = np.searchsorted(np.cumsum(lengths[met]), num_tokens) + 1
        if reached <= len(met) or len(met) == available:
            return met[:reached]
        if first >= limit:
            return _fill_up(layout, weights, lengths, met, num_tokens)
        count = first


def _distinct(rows: np.ndarray) -> np.ndarray:
    """The rows without repeats, in order of their first visit."""
    _, at = np.unique(rows, return_index=True)
    return rows[np.sort(at)]


def _fill_up(layout: RowLayout, weights: np.ndarray, lengths: np.ndarray, met: np.ndarray, num_tokens: int) -> np.ndarray:
    """Adds the rows that visits hardly ever meet, so that a draw of nearly everything ends."""
    ranges = [layout.rows_of(c) for c in np.flatnonzero(weights)]
    met = _distinct(np.concatenate([met, *ranges]))
    return met[: np.searchsorted(np.cumsum(lengths[met]), num_tokens) + 1]
