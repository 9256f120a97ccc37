"""Assignment of a step's rows to ranks and micro-batches.

Rows go to ranks by longest processing time first (Graham 1969): the longest row to the rank with the fewest tokens.
Inside a rank they go into micro-batches of at most `tokens_per_microbatch` tokens:

    packed   best-fit decreasing gives a small number of micro-batches (Johnson 1974); rows are spread over them evenly
    padded   rows of similar length go together, since a micro-batch costs rows x longest

Every rank gets the same number of micro-batches, some perhaps empty, so that no rank waits in a collective that another
never enters.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence


def assign(
    lengths: Sequence[int],
    *,
    world_size: int,
    tokens_per_microbatch: int,
    packed: bool,
    rank_of: Sequence[int | None] | None = None,
) -> list[list[list[int]]]:
    """Assign rows: indices of `lengths` by `[rank][micro-batch]`. Deterministic, so that every rank computes it alone.

    Args: `lengths` in tokens; `rank_of[i]`: the rank that row i must stay on, None for any.
    Raises: ValueError where a row is longer than a micro-batch, or a rank does not exist.
    """
    lengths = [int(length) for length in lengths]
    rank_of = [None] * len(lengths) if rank_of is None else list(rank_of)
    _check(lengths, world_size, tokens_per_microbatch, rank_of)
    ranks = _spread_over_ranks(lengths, world_size, rank_of)
    split = _pack if packed else _group
    fewest = [split(rows, lengths, tokens_per_microbatch, None) for rows in ranks]
    num_micro = max(1, *(len(micros) for micros in fewest))
    even = [split(rows, lengths, tokens_per_microbatch, num_micro) for rows in ranks]
    return [[sorted(rows) for rows in micros] + [[] for _ in range(num_micro - len(micros))] for micros in even]


def _check(lengths: list[int], world_size: int, capacity: int, rank_of: list[int | None]) -> None:
    if world_size < 1 or len(rank_of) != len(lengths):
        raise ValueError(f"world_size {world_size}, {len(lengths)} lengths, {len(rank_of)} ranks do not fit together")
    if lengths and max(lengths) > capacity:
        raise ValueError(
            f"a row of {max(lengths)} tokens does not fit into tokens_per_microbatch {capacity}; "
            f"set train.tokens_per_microbatch: {max(lengths)} or a smaller train.max_length"
        )
    if any(rank is not None and not 0 <= rank < world_size for rank in rank_of):
        raise ValueError(f"rank_of names a rank outside 0 to {world_size - 1}")


def _longest_first(rows: Sequence[int], lengths: list[int]) -> list[int]:
    return sorted(rows, key=lambda i: (-lengths[i], i))


def _spread_over_ranks(lengths: list[int], world_size: int, rank_of: list[int | None]) -> list[list[int]]:
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    for i, pinned in enumerate(rank_of):
        if pinned is not None:
            ranks[pinned].append(i)
    loads = [(sum(lengths[i] for i in rows), rank) for rank, rows in enumerate(ranks)]
    heapq.heapify(loads)
    for i in _longest_first([i for i, pinned in enumerate(rank_of) if pinned is None], lengths):
        load, rank = loads[0]
        ranks[rank].append(i)
        heapq.heapreplace(loads, (load + lengths[i], rank))
    return ranks


# --------------------------------------------------------------------------------------------------------------- packed


def _pack(rows: list[int], lengths: list[int], capacity: int, num_bins: int | None) -> list[list[int]]:
    rows = _longest_first(rows, lengths)
    if num_bins is not None and (even := _pack_evenly(rows, lengths, capacity, num_bins)):
        return even
    return _best_fit(rows, lengths, capacity)


def _best_fit(rows: list[int], lengths: list[int], capacity: int) -> list[list[int]]:
    """Put each row into the fullest bin that still takes it."""
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for i in rows:
        at = bisect.bisect_left(free, (lengths[i], -1))
        left, number = free.pop(at) if at < len(free) else (capacity, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(i)
        bisect.insort(free, (left - lengths[i], number))
    return bins


def _pack_evenly(rows: list[int], lengths: list[int], capacity: int, num_bins: int) -> list[list[int]] | None:
    """Put each row into the emptiest bin; None where one overflows."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [(0, number) for number in range(num_bins)]
    for i in rows:
        load, number = loads[0]
        if load + lengths[i] > capacity:
            return None
        bins[number].append(i)
        heapq.heapreplace(loads, (load + lengths[i], number))
    return bins


# --------------------------------------------------------------------------------------------------------------- padded


def _group(rows: list[int], lengths: list[int], capacity: int, num_groups: int | None) -> list[list[int]]:
    rows = _longest_first(rows, lengths)
    groups = _group_under(rows, lengths, capacity)
    if not rows or num_groups is None:
        return groups
    # The smallest cap that still gives at most `num_groups` groups makes their costs about equal.
    low, high = lengths[rows[0]], capacity
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_group_under(rows, lengths, middle)) <= num_groups else (middle + 1, high)
    return _group_under(rows, lengths, high)


def _group_under(rows: list[int], lengths: list[int], cap: int) -> list[list[int]]:
    """Cut rows, sorted by falling length, into runs of cost rows x longest <= cap."""
    groups, start = [], 0
    while start < len(rows):
        stop = start + max(1, cap // max(lengths[rows[start]], 1))
        groups.append(rows[start:stop])
        start = stop
    return groups
