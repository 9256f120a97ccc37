"""The rows that stay in a full memory."""

from __future__ import annotations

import numpy as np
import pytest

from safecl.replay import ReplayBuffer
from safecl.replay.selection.keep import Keeper
from tests.replay.samples import config, rows, same_row, token_row, with_teacher


def chi_square_is_plausible(statistic: float, degrees: int, together: int = 1) -> bool:
    """Within five standard deviations of what chance gives: a broken sampler is hundreds away.

    together: rows whose counts rise and fall together, which widens the statistic.
    """
    return abs(statistic - degrees) < 5 * np.sqrt(2 * degrees * together)


def test_every_row_is_equally_likely_to_stay_over_2000_streams():
    num_rows, capacity, streams = 300, 90, 2000
    counts = np.zeros(num_rows)
    for seed in range(streams):
        keeper = Keeper.from_config(config(capacity=capacity), seed)
        positions = np.arange(num_rows)
        for portion in np.array_split(positions, 3):
            keeper.count("", len(portion))
        counts += keeper.survivors(positions, np.ones(num_rows, np.int64), np.zeros(num_rows, np.int64), [""])
    assert counts.sum() == streams * capacity
    expected = streams * capacity / num_rows
    # counts of a sample without replacement: variance p (1 - p), and one degree of freedom less
    statistic = ((counts - expected) ** 2).sum() / (expected * (1 - capacity / num_rows))
    assert chi_square_is_plausible(statistic, num_rows - 1)
    # and not only each row: each pair of neighbours, whose positions differ in one bit
    assert chi_square_is_plausible(
        ((counts[::2] - counts[1::2]) ** 2).sum() / (2 * expected * (1 - capacity / num_rows)), num_rows // 2
    )


def test_the_buffer_keeps_what_the_rule_says_through_its_files():
    for seed in range(5):
        buffer = ReplayBuffer(config(capacity=50), seed=seed)
        offered = rows(170)
        buffer.insert(offered)
        hashes = Keeper.from_config(config(capacity=50), seed).priorities(np.arange(170))
        assert buffer.keys() == sorted(np.argsort(hashes)[:50].tolist())
        assert all(same_row(buffer.get(key), offered[key]) for key in buffer.keys())


def test_nothing_is_dropped_while_there_is_room():
    buffer = ReplayBuffer(config(capacity=400))
    buffer.insert(rows(400))
    assert buffer.keys() == list(range(400))


@pytest.mark.parametrize(
    "settings",
    [{"capacity": 40}, {"capacity": 40, "policy": "fifo"}, {"capacity": 40, "policy": "balanced"}, {"capacity": "9KB"}],
)
def test_contents_do_not_depend_on_the_portions_in_which_rows_arrive(settings):
    offered = [token_row(i, tags={"category": f"c{i % 3 if i < 100 else 3 + i % 5}"}) for i in range(230)]
    at_once, one_by_one, mixed = (ReplayBuffer(config(**settings), seed=3) for _ in range(3))
    at_once.insert(offered)
    for row in offered:
        one_by_one.insert([row])
    for start in range(0, 230, 37):
        mixed.insert(offered[start : start + 37])
        len(mixed)  # looking at it must not change what stays later
    assert at_once.keys() == one_by_one.keys() == mixed.keys()


@pytest.mark.parametrize("policy", ["reservoir", "balanced"])
def test_a_row_that_did_not_fit_lets_no_later_one_pass_it(policy):
    """With unequal rows there is room after the first that does not fit. Its use must not depend on who came first."""
    for seed in range(12):
        lengths = np.random.default_rng(seed).choice([4, 600], 60, p=[0.7, 0.3])
        offered = [token_row(i, length=int(n), tags={"category": str(i % 2)}) for i, n in enumerate(lengths)]
        at_once, one_by_one = (ReplayBuffer(config(capacity="12KB", policy=policy), seed=seed) for _ in range(2))
        at_once.insert(offered)
        for row in offered:
            one_by_one.insert([row])
            len(one_by_one)
        assert at_once.keys() == one_by_one.keys()


def test_fifo_keeps_the_latest():
    buffer = ReplayBuffer(config(capacity=30, policy="fifo"))
    buffer.insert(rows(100))
    assert buffer.keys() == list(range(70, 100))


def brute_force_balance(categories: list[str], capacity: int) -> dict[str, int]:
    """Hands out places one by one to the category that holds fewest and still has rows: water-filling in slow
    motion."""
    left = {c: categories.count(c) for c in set(categories)}
    held = dict.fromkeys(left, 0)
    for _ in range(min(capacity, len(categories))):
        poorest = min((c for c in left if left[c]), key=lambda c: held[c])
        held[poorest] += 1
        left[poorest] -= 1
    return held


@pytest.mark.parametrize("seed", range(4))
def test_balanced_gives_every_category_its_share_like_an_independent_simulation(seed):
    random = np.random.default_rng(seed)
    names = [f"c{i}" for i in random.zipf(1.6, 400).clip(max=9)]
    buffer = ReplayBuffer(config(capacity=60, policy="balanced"), seed=seed)
    buffer.insert(token_row(i, tags={"category": name}) for i, name in enumerate(names))
    held = [buffer.get(key).tags["category"] for key in buffer.keys()]
    expected = brute_force_balance(names, 60)
    assert len(held) == 60
    small = {c for c in expected if names.count(c) <= min(expected.values())}
    for category, count in expected.items():
        # the places that do not divide evenly go to other categories than in the simulation
        assert abs(held.count(category) - count) <= (0 if category in small else 1)


def test_balanced_samples_uniformly_inside_a_category():
    counts = np.zeros(120)
    for seed in range(600):
        keeper = Keeper.from_config(config(capacity=40, policy="balanced"), seed)
        category = (np.arange(120) >= 90).astype(np.int64)
        for name, amount in (("a", 90), ("b", 30)):
            keeper.count(name, amount)
        counts += keeper.survivors(np.arange(120), np.ones(120, np.int64), category, ["a", "b"])
    for part, share in ((counts[:90], 20 / 90), (counts[90:], 20 / 30)):
        statistic = ((part - 600 * share) ** 2).sum() / (600 * share * (1 - share))
        assert chi_square_is_plausible(statistic, len(part) - 1)


def test_balance_by_task_and_by_source():
    for by in ("task", "source"):
        buffer = ReplayBuffer(config(capacity=20, policy="balanced", balance_by=by))
        many, few = rows(50), rows(10, first=100)
        few = [type(row)(row.row, **{"source": row.source, "task": row.task, by: "rare"}) for row in few]
        buffer.insert(many + few)
        held = [getattr(buffer.get(key), by) for key in buffer.keys()]
        assert held.count("rare") == 10 and len(held) == 20


def test_capacity_in_bytes_is_never_exceeded_and_nearly_used():
    buffer = ReplayBuffer(config(capacity="20KB"), seed=1)
    buffer.insert(with_teacher(row) for row in rows(300))
    held = int(buffer.table["nbytes"].sum()) if len(buffer) else 0
    assert 20_000 - 6_000 < held <= 20_000


def test_prefix_storage_keeps_the_first_targets_and_more_rows_in_the_same_bytes():
    offered = [with_teacher(row) for row in rows(300, length=50)]
    whole = ReplayBuffer(config(capacity="40KB"), seed=1)
    prefix = ReplayBuffer(config(capacity="40KB", prefix_tokens=3), seed=1)
    whole.insert(offered)
    prefix.insert(offered)
    assert len(prefix) > 2.5 * len(whole)
    for key in prefix.keys():
        row, original = prefix.get(key), offered[key]
        end = len(row.row.input_ids)
        assert row.row.num_targets == 3 and row.row.loss_mask[-1]
        assert np.array_equal(row.row.input_ids, original.row.input_ids[:end]) and np.array_equal(
            row.row.loss_mask, original.row.loss_mask[:end]
        )
        assert np.array_equal(row.teacher.log_probs, original.teacher.log_probs[:3])


def test_a_guard_keeps_out_flagged_rows_and_outliers_whatever_the_portions():
    random = np.random.default_rng(0)
    offered = [
        token_row(
            i,
            prior_nll=float(random.normal(1.0, 0.2)) if i % 10 else 40.0,
            tags={"unsafe": "yes"} if i % 7 == 0 else {},
        )
        for i in range(300)
    ]
    guard = {"flag_tag": "unsafe", "max_deviations": 8}
    at_once, one_by_one = (ReplayBuffer(config(capacity=1000, guard=guard)) for _ in range(2))
    report = at_once.insert(offered)
    for row in offered:
        one_by_one.insert([row])
    held = set(at_once.keys())
    assert held == set(one_by_one.keys())
    assert not any(key % 7 == 0 for key in held)
    # once there are statistics every outlier stays out, and those from before are let go at the next refresh
    assert not any(key % 10 == 0 for key in held if key < 256)
    assert held == {i for i in range(300) if i % 7 and i % 10}
    assert report.kept_out["flagged: unsafe"] == 43


def test_a_guard_bounds_the_aligned_models_loss_read_from_its_outputs():
    likely, unlikely = with_teacher(token_row(1)), with_teacher(token_row(2))
    labels = likely.row.input_ids[likely.row.loss_mask]
    likely.teacher.indices[:, 0] = labels
    likely.teacher.log_probs[:, 0] = -0.1
    buffer = ReplayBuffer(config(guard={"max_nll": 0.5}))
    buffer.insert([likely, unlikely])
    assert buffer.keys() == [0]
    assert abs(buffer.get(0).prior_nll - 0.1) < 1e-3
