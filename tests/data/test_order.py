"""The order of examples is a function of (seed, step) and of row ids, and of nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from safecl.config import TrainConfig
from safecl.data import Row, TaskOrder, TokenDataset, assign, resolve_tokens_per_batch
from safecl.data.order import keyed_hash
from safecl.data.tokens import StoreWriter, map_store


def dataset_of(folder, lengths, ids=None, seed=0) -> TokenDataset:
    """Rows of these lengths, without any text."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = np.random.default_rng(seed).integers(1, 2**63, len(lengths)) if ids is None else ids
    writer = StoreWriter(folder)
    for i, (length, key) in enumerate(zip(lengths, ids, strict=True)):
        mask = np.ones(length, bool)
        mask[0] = False
        writer.add(Row(int(key), np.full(length, i % 30000, np.int32), mask), i + 1, {})
    report = {
        "path": "x",
        "seen": len(lengths),
        "bad": 0,
        "truncated": 0,
        "max_length": 0,
        "max_token_id": 9,
        "template": "",
        "examples": [],
    }
    return TokenDataset.from_store(
        map_store(folder, {"sizes": writer.close(), "report": report, "path": "x", "key": str(folder)})
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> TokenDataset:
    lengths = np.random.default_rng(1).integers(2, 90, 1000)
    return dataset_of(tmp_path_factory.mktemp("rows"), lengths)


def epoch(order: TaskOrder, number: int = 0) -> np.ndarray:
    steps = range(number * order.steps_per_epoch, (number + 1) * order.steps_per_epoch)
    return np.concatenate([order.rows_of_step(step) for step in steps])


def test_every_epoch_takes_every_row_once_in_an_order_of_its_own(data):
    order = TaskOrder(data, seed=3, tokens_per_batch=700, epochs=3)
    assert order.num_steps == 3 * order.steps_per_epoch
    epochs = [epoch(order, e) for e in range(3)]
    for rows in epochs:
        assert sorted(rows.tolist()) == list(range(1000))
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])


def test_a_step_is_the_same_whenever_and_by_whomever_it_is_asked_for(data):
    steps = list(range(60))
    first = TaskOrder(data, seed=3, tokens_per_batch=700, epochs=2)
    forwards = [first.rows_of_step(s).tolist() for s in steps]
    again = TaskOrder(data, seed=3, tokens_per_batch=700, max_steps=5)
    assert [again.rows_of_step(s).tolist() for s in reversed(steps)] == forwards[::-1]
    numpy_seed = TaskOrder(data, seed=np.int64(3), tokens_per_batch=700, epochs=2)
    assert numpy_seed.rows_of_step(0).tolist() == forwards[0]
    other = TaskOrder(data, seed=4, tokens_per_batch=700, epochs=2)
    assert other.rows_of_step(0).tolist() != forwards[0]


def test_leaving_one_row_out_moves_no_other(data, tmp_path):
    keep = np.delete(np.arange(1000), 123)
    fewer = data.select(keep)
    for e in range(2):
        whole = epoch(TaskOrder(data, seed=3, tokens_per_batch=700, epochs=3), e)
        part = keep[epoch(TaskOrder(fewer, seed=3, tokens_per_batch=700, epochs=3), e)]
        assert part.tolist() == [i for i in whole if i != 123]


def test_the_order_of_lines_in_the_file_does_not_matter(data):
    shuffle = np.random.default_rng(5).permutation(1000)
    moved = TaskOrder(data.select(shuffle), seed=3, tokens_per_batch=700, epochs=1)
    plain = TaskOrder(data, seed=3, tokens_per_batch=700, epochs=1)
    for step in range(plain.num_steps):
        assert shuffle[moved.rows_of_step(step)].tolist() == plain.rows_of_step(step).tolist()


@pytest.mark.parametrize("tokens_per_batch", [1, 2, 50, 89, 90, 700, 5000, 10**9])
def test_steps_are_never_empty_and_at_most_one_row_too_long(data, tokens_per_batch):
    order = TaskOrder(data, seed=0, tokens_per_batch=tokens_per_batch, epochs=1)
    sizes = [int(data.lengths[order.rows_of_step(s)].sum()) for s in range(order.num_steps)]
    assert min(sizes) > 0 and max(sizes) < tokens_per_batch + data.lengths.max()


def test_no_step_of_an_epoch_is_a_small_remainder(data):
    order = TaskOrder(data, seed=0, tokens_per_batch=data.num_tokens // 7 - 100, epochs=1)
    sizes = [int(data.lengths[order.rows_of_step(s)].sum()) for s in range(order.num_steps)]
    assert order.num_steps == 8 and max(sizes) - min(sizes) <= 2 * data.lengths.max()


def test_epochs_may_be_fractions_and_max_steps_goes_round(data):
    whole = TaskOrder(data, seed=0, tokens_per_batch=700, epochs=1)
    half = TaskOrder(data, seed=0, tokens_per_batch=700, epochs=0.5)
    assert half.num_steps == -(-whole.num_steps // 2)
    assert TaskOrder(data, seed=0, tokens_per_batch=700, epochs=0.0001).num_steps == 1
    many = TaskOrder(data, seed=0, tokens_per_batch=700, max_steps=1000)
    assert many.num_steps == 1000 and many.epoch_of(999) == 999 // whole.num_steps
    assert len(many.rows_of_step(999)) > 0


def test_one_enormous_row_leaves_no_step_empty(tmp_path):
    for n, at in ((5, 0), (5, 2), (5, 4), (1, 0), (2, 1)):
        lengths = [2] * n
        lengths[at] = 10_000
        data = dataset_of(tmp_path / f"{n}-{at}", lengths)
        order = TaskOrder(data, seed=0, tokens_per_batch=3, epochs=1)
        assert order.num_steps == n
        assert all(len(order.rows_of_step(s)) == 1 for s in range(n))


@pytest.mark.parametrize("packed", [True, False])
def test_1_2_and_4_ranks_see_the_same_rows_in_every_step(data, packed):
    order = TaskOrder(data, seed=7, tokens_per_batch=700, epochs=3)
    for step in range(0, order.num_steps, 5):
        rows = order.rows_of_step(step)
        for world_size in (1, 2, 4):
            shares = assign(data.lengths[rows], world_size=world_size, tokens_per_microbatch=128, packed=packed)
            seen = [rows[i] for rank in shares for micro in rank for i in micro]
            assert sorted(seen) == sorted(rows.tolist())


def test_keyed_hashes_are_spread_evenly_distinct_and_independent():
    ids = np.arange(20_000, dtype=np.uint64)  # the hardest case: consecutive numbers
    a, b = keyed_hash(ids, "order", 0, 0), keyed_hash(ids, "order", 0, 1)
    assert len(np.unique(a)) == len(ids)
    counts = np.bincount((a >> np.uint64(58)).astype(int), minlength=64)
    assert abs(counts - 20_000 / 64).max() < 5 * np.sqrt(20_000 / 64)
    ranks = np.argsort(np.argsort(a)), np.argsort(np.argsort(b)), np.arange(20_000)
    for x, y in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.corrcoef(ranks[x], ranks[y])[0, 1]) < 4 / np.sqrt(20_000)


@pytest.mark.parametrize(
    ("num_rows", "settings", "expected_steps"),
    [
        (1000, {}, 100),
        (1000, {"epochs": 1}, 100),
        (20, {"epochs": 1}, 20),
        (1000, {"tokens_per_batch": 999}, None),
        (1000, {"max_steps": 70}, 70),
    ],
)
def test_auto_batches_give_at_least_100_steps_where_there_are_rows_for_them(data, num_rows, settings, expected_steps):
    train, part = TrainConfig(**settings), data.select(np.arange(num_rows))
    size = resolve_tokens_per_batch(train, part)
    if expected_steps is None:
        assert size == 999
        return
    assert part.lengths.max() <= size <= 65536
    order = TaskOrder(
        part,
        seed=0,
        tokens_per_batch=size,
        **({"max_steps": 70} if "max_steps" in settings else {"epochs": train.epochs}),
    )
    assert order.num_steps >= min(expected_steps, 0.5 * num_rows)


def test_auto_batches_stay_at_65536_tokens_for_large_data(tmp_path):
    assert resolve_tokens_per_batch(TrainConfig(), dataset_of(tmp_path, [60_000] * 60)) == 65536


@pytest.mark.parametrize("settings", [{}, {"epochs": 1, "max_steps": 1}, {"epochs": 1, "tokens_per_batch": 0}])
def test_an_order_without_a_length_is_refused(data, settings):
    with pytest.raises(ValueError, match="tokens_per_batch"):
        TaskOrder(data, seed=0, **{"tokens_per_batch": 10, **settings})
