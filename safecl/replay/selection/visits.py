"""The visits of a draw: a net in two dimensions, shifted at random for every (seed, stream, step).

Visit i looks at the point (x_i, y_i) of the Sobol' sequence (x is van der Corput's, together a (0, 2)-net in base 2),
both coordinates XORed with a number drawn from the seed (a digital shift: each point is exactly uniform, the net stays
a net). y chooses the class of rows (by the policy's weights), x the row inside the class. The rows of a class lie in
strips of neighbouring shards, ordered by length inside a strip, so

    - the leading bits of x choose the strip: W visits of an aligned run meet each of W ranks once, for W = 2, 4, ...
    - the remaining bits choose the length and are the same for all strips: ranks get rows of nearly equal length at the
      same time

A visit to a strip is kept with probability (rows of the strip / rows of the fullest strip), which makes all rows of a
class equally likely.

Source: Niederreiter 1992, ch. 4; digital shifts: Owen 2003, "Quasi-Monte Carlo sampling", sec. 7.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from safecl.replay.files.hashing import NUM_GROUPS, NUM_SHARDS, mix, name_key

# With two rows per strip, long and short rows cancel; more strips would make all rows of a small draw equally long.
ROWS_PER_STRIP = 2
# Fuller strips differ less in size, so fewer visits are rejected.
SMALLEST_STRIP = 16
SHARD_BITS = NUM_SHARDS.bit_length() - 1
_SCATTER, _THINNING, _ROUNDING = (
    name_key(f"safecl replay {purpose}") for purpose in ("scatter", "thinning", "rounding")
)


@dataclass(frozen=True)
class RowLayout:
    """Rows ordered for visiting.

    sizes: int64 [classes], rows per class. order: int32 [rows], row numbers by (class, strip, length). strip_bits:
    int64 [classes], log2 of the class's number of strips.
    first_strip: int64 [classes + 1], into starts. starts: int64 [all strips + 1], into order. largest: int64 [classes],
    its fullest strip.
    """

    sizes: np.ndarray
    order: np.ndarray
    strip_bits: np.ndarray
    first_strip: np.ndarray
    starts: np.ndarray
    largest: np.ndarray

    def rows_of(self, chosen: int) -> np.ndarray:
        """Return the row numbers of a class."""
        return self.order[self.starts[self.first_strip[chosen]] : self.starts[self.first_strip[chosen + 1]]]


def lay_out(
    classes: np.ndarray, num_classes: int, shards: np.ndarray, lengths: np.ndarray, num_strips: int
) -> RowLayout:
    """Sort rows for visiting. classes, shards: int [rows]; lengths: int [rows], tokens; num_strips: a power of two, at
    most 64."""
    sizes = np.bincount(classes, minlength=num_classes)
    strips = np.minimum(num_strips, np.maximum(1, sizes // SMALLEST_STRIP))
    bits = np.array([int(n).bit_length() - 1 for n in strips], np.int64)
    first_strip = np.concatenate([[0], np.cumsum(1 << bits)])
    strip = first_strip[classes] + (shards.astype(np.int64) >> (SHARD_BITS - bits[classes]))
    longest = int(lengths.max(initial=0)) + 1
    order = np.argsort(strip * longest + lengths, kind="stable").astype(np.int32)
    counts = np.bincount(strip, minlength=first_strip[-1])
    largest = np.maximum.reduceat(counts, first_strip[:-1])
    return RowLayout(sizes, order, bits, first_strip, np.concatenate([[0], np.cumsum(counts)]), largest)


def num_strips_for(num_rows: float) -> int:
    """Return the number of strips for draws of about `num_rows` rows: a power of two, at most 64."""
    return 1 << (max(1, min(NUM_GROUPS, int(num_rows / ROWS_PER_STRIP))).bit_length() - 1)


def points(first: int, count: int, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Return points first .. first + count - 1 of the shifted net as 32-bit fractions; two uint64 arrays [count]."""
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
    """Return the digital shift of a draw."""
    return int(mix(seed, name_key(stream), step))


def visit(
    layout: RowLayout, weights: np.ndarray, first: int, count: int, key: int, net: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Return the classes and row numbers that visits first .. first + count - 1 meet, int64 [count] each; row -1 where
    a visit meets none.

    weights: float64 [classes], how often each class is visited. net: visits follow the net; else they are independent.
    """
    x, y = points(first, count, key)
    if not net:
        x = mix(key ^ _SCATTER, np.arange(first, first + count, dtype=np.uint64)) >> np.uint64(32)
    chosen = _classes_at(y, weights)
    bits = layout.strip_bits[chosen].astype(np.uint64)
    strip = layout.first_strip[chosen] + (x >> (np.uint64(32) - bits)).astype(np.int64)
    start, size = layout.starts[strip], layout.starts[strip + 1] - layout.starts[strip]
    within = (x << bits) & np.uint64(0xFFFFFFFF)
    place = start + ((within * size.astype(np.uint64)) >> np.uint64(32)).astype(np.int64)
    rows = layout.order[np.minimum(place, len(layout.order) - 1)].astype(np.int64)
    return chosen, np.where(_uniform(key, first, count) * layout.largest[chosen] < size, rows, -1)


def _classes_at(y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the class of each visit, int64 [count]: a class gets its share of the weights of y's range."""
    if len(weights) == 1:
        return np.zeros(len(y), np.int64)
    edges = np.cumsum(weights) / weights.sum()
    # rounding may leave the last edge a hair below 1
    return np.minimum(np.searchsorted(edges, y / 2.0**32, side="right"), np.flatnonzero(weights)[-1])


def _uniform(key: int, first: int, count: int) -> np.ndarray:
    """Return a number in [0, 1) for each visit; float64 [count]."""
    return (mix(key, np.arange(first, first + count, dtype=np.uint64)) >> np.uint64(11)) * 2.0**-53


def take_rows(
    layout: RowLayout,
    weights: np.ndarray,
    num_rows: int,
    key: int,
    chances: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Return `num_rows` distinct row numbers in the order of their visits, or all rows of the weighted classes where
    there are fewer; int64 [n].

    The first `num_rows` visits settle how many rows come from each class, also where they meet no row. The number of
    rows is fixed beforehand: stopping at a number of tokens would draw short rows more often, because the rows of a
    draw have similar lengths. `chances(rows)`, between 0 and 1, is the probability that a visit takes a row, where the
    rows of a class are not equally likely. Visits are then independent: in a net a row always comes with the same
    others, and would be drawn less often where those are likely.
    """
    weights = np.where(layout.sizes > 0, weights, 0.0)
    available = np.where(weights > 0, layout.sizes, 0)
    num_rows = min(num_rows, int(available.sum()))
    if num_rows == 0:
        return np.zeros(0, np.int64)
    classes, met = np.zeros((2, 0), np.int64)
    first, count, quotas = 0, num_rows + num_rows // 4 + 8, None
    while True:
        chosen, rows = visit(layout, weights, first, count, key, net=chances is None)
        if quotas is None:
            quotas = _quotas(np.bincount(chosen[:num_rows], minlength=len(weights)), available, num_rows)
        if chances is not None:
            rows = np.where(_uniform(key ^ _THINNING, first, count) < chances(rows), rows, -1)
        classes, met = _distinct(np.concatenate([classes, chosen[rows >= 0]]), np.concatenate([met, rows[rows >= 0]]))
        first = count = first + count
        if first > 64 * available.sum():  # some rows are hardly ever met, and a draw of nearly all rows must end
            rest = [layout.rows_of(c) for c in np.flatnonzero(quotas).tolist()]
            owner = np.repeat(np.flatnonzero(quotas), [len(rows) for rows in rest])
            classes, met = _distinct(np.concatenate([classes, owner]), np.concatenate([met, *rest]))
        taken = met[_place_in_class(classes) < quotas[classes]]
        if len(taken) == num_rows:
            return taken


def _quotas(wanted: np.ndarray, available: np.ndarray, num_rows: int) -> np.ndarray:
    """Return the rows per class, int64 [classes]: as wanted where the class has them; the classes with most rows left
    give the rest."""
    quotas = np.minimum(wanted, available)
    for c in np.argsort(quotas - available, kind="stable"):
        quotas[c] += min(num_rows - int(quotas.sum()), int(available[c] - quotas[c]))
    return quotas


def _place_in_class(classes: np.ndarray) -> np.ndarray:
    """Count the entries of the same class before each entry; int64 [n]."""
    order = np.argsort(classes, kind="stable")
    ordered = classes[order]
    place = np.empty(len(classes), np.int64)
    place[order] = np.arange(len(classes)) - np.searchsorted(ordered, ordered)
    return place


def num_rows_for(tokens: float, mean_length: float, key: int) -> int:
    """Return how many rows hold `tokens` tokens on average: rounded at random, so that the mean over steps is right; at
    least 1."""
    return max(1, int(tokens / mean_length + float(_uniform(key ^ _ROUNDING, 0, 1)[0])))


def _distinct(classes: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drop repeats of a row, keeping the order of the first visits."""
    _, at = np.unique(rows, return_index=True)
    at.sort()
    return classes[at], rows[at]
