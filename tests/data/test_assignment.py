"""Rows over ranks and micro-batches: the same number everywhere, nothing lost, nothing too large."""

from __future__ import annotations

import numpy as np
import pytest

from safecl.data import assign


def cost(rows, lengths, packed) -> int:
    if not rows:
        return 0
    return sum(lengths[i] for i in rows) if packed else len(rows) * max(lengths[i] for i in rows)


def check(lengths, world_size, capacity, packed, rank_of=None):
    shares = assign(lengths, world_size=world_size, tokens_per_microbatch=capacity, packed=packed, rank_of=rank_of)
    assert len(shares) == world_size
    assert len({len(micros) for micros in shares}) == 1 and len(shares[0]) >= 1
    assert sorted(i for micros in shares for rows in micros for i in rows) == list(range(len(lengths)))
    assert all(cost(rows, lengths, packed) <= capacity for micros in shares for rows in micros)
    for rank, micros in enumerate(shares):
        for i in (i for rows in micros for i in rows):
            assert rank_of is None or rank_of[i] in (None, rank)
    assert shares == assign(
        lengths, world_size=world_size, tokens_per_microbatch=capacity, packed=packed, rank_of=rank_of
    )
    return shares


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("pinned", [False, True])
def test_200_random_steps_are_dealt_out_equally_and_completely(packed, pinned):
    source = np.random.default_rng(0)
    for _ in range(200):
        world_size, capacity = int(source.choice([1, 2, 3, 4, 7, 8, 16])), int(source.integers(20, 400))
        lengths = source.integers(1, capacity + 1, int(source.integers(0, 120))).tolist()
        rank_of = (
            [int(r) if r >= 0 else None for r in source.integers(-world_size, world_size, len(lengths))]
            if pinned
            else None
        )
        check(lengths, world_size, capacity, packed, rank_of)


@pytest.mark.parametrize("packed", [True, False])
def test_tokens_are_balanced_over_ranks(packed):
    lengths = np.random.default_rng(2).integers(5, 200, 400).tolist()
    loads = [sum(lengths[i] for rows in micros for i in rows) for micros in check(lengths, 8, 2048, packed)]
    assert max(loads) <= 1.01 * min(loads)


def test_few_rows_still_reach_every_rank_and_their_micro_batches_are_even():
    assert all(any(micros) for micros in check([10] * 4, 4, 1000, True))
    shares = check([50] * 24, 2, 410, True)  # 600 tokens per rank: best fit alone would give 400 and 200
    assert [[len(rows) for rows in micros] for micros in shares] == [[6, 6], [6, 6]]


def test_packing_needs_no_more_micro_batches_than_best_fit_decreasing():
    # First fit in the given order would need four bins here, best fit decreasing three.
    for rank_of in (None, [0] * 6):
        assert len(check([50, 30, 60, 40, 70, 50], 1, 100, True, rank_of)[0]) == 3
    lengths = np.random.default_rng(3).integers(1, 500, 1000).tolist()
    shares = check(lengths, 4, 1000, True)
    assert len(shares[0]) <= np.ceil(1.03 * sum(lengths) / 4000)


def test_padded_micro_batches_hold_rows_of_similar_length():
    lengths = np.random.default_rng(4).integers(1, 512, 2000).tolist()
    shares = check(lengths, 4, 4096, False)
    padded = sum(cost(rows, lengths, False) for micros in shares for rows in micros)
    assert padded <= 1.06 * sum(lengths), "rows of mixed length would cost about twice their tokens"


def test_pinned_rows_stay_and_free_rows_fill_up_the_other_ranks():
    lengths = [100] * 4 + [50] * 8
    shares = check(lengths, 2, 200, True, [0] * 4 + [None] * 8)
    loads = [sum(lengths[i] for rows in micros for i in rows) for micros in shares]
    assert loads == [400, 400]


@pytest.mark.parametrize("packed", [True, False])
def test_a_rank_without_rows_has_as_many_empty_micro_batches(packed):
    shares = check([90, 90, 90], 2, 100, packed, [1, 1, 1])
    assert shares[0] == [[], [], []]
    assert check([], 3, 100, packed) == [[[]], [[]], [[]]]


@pytest.mark.parametrize("packed", [True, False])
def test_empty_micro_batches_are_lists_of_their_own(packed):
    shares = assign([9, 9, 9], world_size=3, tokens_per_microbatch=10, packed=packed, rank_of=[1, 1, 1])
    empty = [micro for rank in (0, 2) for micro in shares[rank]]
    assert empty == [[]] * 6 and len({id(micro) for micro in empty}) == 6


@pytest.mark.parametrize(
    ("lengths", "rank_of", "says"),
    [
        ([11], None, "11 tokens does not fit into tokens_per_microbatch 10"),
        ([1], [2], "rank outside 0 to 1"),
        ([1], [0, 0], "do not fit together"),
    ],
)
def test_what_cannot_be_dealt_out_is_a_message(lengths, rank_of, says):
    with pytest.raises(ValueError, match=says):
        assign(lengths, world_size=2, tokens_per_microbatch=10, packed=True, rank_of=rank_of)
