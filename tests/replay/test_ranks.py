"""The same memory on any number of ranks, and after any resume."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

from safecl.config import ConfigError
from safecl.replay import MemoryRow, ReplayBuffer
from safecl.replay.files.segments import scan
from safecl.replay.rows import ReplayError
from tests.replay.samples import config, rows, same_row, token_row, with_teacher


class Ranks:
    """The buffers of all ranks of a run, which share a folder and are called together."""

    def __init__(self, world_size: int, folder, **settings):
        self.world_size = world_size
        self.buffers = [
            ReplayBuffer(config(**settings), folder, seed=5, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]

    def insert(self, offered):
        for buffer in self.buffers:
            buffer.insert(offered)

    def train(self, steps):
        """Draws, reads every row on its own rank, and logs losses; returns (keys, token sums) per step."""
        seen = []
        for step in steps:
            draws = [buffer.draw(step, 300, "replay") for buffer in self.buffers]
            assert all(draw == draws[0] for draw in draws)
            sums = [int(self.owner(key).get(key).row.input_ids.sum()) for key in draws[0]]
            for buffer in self.buffers:
                buffer.log_scores(
                    step,
                    draws[0][::-1] if buffer.rank else draws[0],
                    (np.array(sums) % 97 / 30)[:: -1 if buffer.rank else 1],
                )
            seen.append((draws[0], sums))
        return seen

    def owner(self, key):
        return self.buffers[self.buffers[0].rank_of(key)]

    def save(self):
        for buffer in self.buffers:
            buffer.flush()
        states = [buffer.state_dict() for buffer in self.buffers]
        assert all(np.array_equal(state["index"], states[0]["index"]) for state in states)
        return states[0]

    def load(self, state):
        for buffer in self.buffers:
            buffer.load_state_dict(state)

    def close(self):
        for buffer in self.buffers[::-1]:
            buffer.close()


POLICIES = [
    {},
    {"draw": "mix_cd"},
    {"draw": "loss_aware", "rest_steps": 3},
    {"policy": "balanced"},
    {"capacity": "60KB", "policy": "fifo"},
]


def offered_rows(count, first=0):
    return [
        with_teacher(row)
        for row in (token_row(first + i, tags={"category": f"c{(first + i) % 3}"}) for i in range(count))
    ]


@pytest.mark.parametrize("settings", POLICIES)
def test_contents_and_draws_are_the_same_for_1_2_and_4_ranks(tmp_path, settings):
    settings = {"capacity": 120, **settings}
    runs = []
    for world_size in (1, 2, 4):
        ranks = Ranks(world_size, tmp_path / str(world_size), **settings)
        ranks.insert(offered_rows(150))
        first = ranks.train(range(12))
        ranks.insert(offered_rows(60, first=150))
        runs.append((first, ranks.train(range(12, 20)), [buffer.keys() for buffer in ranks.buffers]))
        ranks.close()
    assert runs[0][:2] == runs[1][:2] == runs[2][:2]
    assert all(keys == runs[0][2][0] for run in runs for keys in run[2])


@pytest.mark.parametrize("settings", POLICIES)
def test_a_run_resumed_on_4_then_1_then_2_ranks_sees_the_same_rows(tmp_path, settings):
    settings = {"capacity": 120, **settings}
    straight = Ranks(1, tmp_path / "straight", **settings)
    straight.insert(offered_rows(150))
    expected = straight.train(range(10))
    straight.insert(offered_rows(50, first=150))
    expected += straight.train(range(10, 30))
    straight.close()

    seen, state, step = [], None, 0
    for world_size, until in ((4, 8), (1, 17), (2, 30)):
        ranks = Ranks(world_size, tmp_path / "resumed", **settings)
        if state is None:
            ranks.insert(offered_rows(150))
        else:
            ranks.load(state)
        while step < until:
            if step == 10:
                ranks.insert(offered_rows(50, first=150))
            seen += ranks.train([step])
            step += 1
        state = ranks.save()
        ranks.train(range(step, step + 3))  # what happens after the checkpoint is lost with the killed run
        ranks.insert(rows(20, first=900))
        ranks.close()
    assert seen == expected


def test_a_resumed_run_replaces_what_the_killed_one_inserted_after_the_checkpoint(tmp_path):
    killed = ReplayBuffer(config(), tmp_path)
    killed.insert(rows(40))
    state = killed.state_dict()
    killed.insert(rows(30, first=500))
    killed.close()

    resumed = ReplayBuffer(config(), tmp_path)
    assert len(resumed) == 70
    resumed.load_state_dict(state)
    offered = rows(25, first=900)
    resumed.insert(offered)
    del resumed  # as a kill would: no flush, no index

    for index in [*sorted(tmp_path.glob("index-*"), reverse=True), None]:
        with ReplayBuffer(config(), tmp_path, mode="read") as again:
            assert len(again) == 65
            assert all(same_row(again.get(40 + i), row) for i, row in enumerate(offered))
        if index is not None:
            index.unlink()  # and the same again from an older index, and from the segments alone


@pytest.mark.parametrize("settings", [{}, {"capacity": "40KB"}, {"draw": "mix_cd", "prefix_tokens": 2}])
def test_outputs_need_only_be_on_the_rank_that_owns_the_row(tmp_path, settings):
    settings = {"capacity": 70, **settings}
    offered = [
        MemoryRow(r.row, r.source, r.task, teacher=r.teacher, prior_nll=float(r.row.row_id % 5))
        for r in offered_rows(100)
    ]
    alone = Ranks(1, tmp_path / "alone", **settings)
    alone.insert(offered)
    ranks = Ranks(3, tmp_path / "three", **settings)
    for buffer in ranks.buffers:
        own = buffer.ranks_of(range(100)) == buffer.rank
        buffer.insert(
            (row if mine else dataclasses.replace(row, teacher=None) for row, mine in zip(offered, own, strict=True)),
            own_outputs=8,
        )
    assert ranks.train(range(6)) == alone.train(range(6))
    ranks.save()
    for key in alone.buffers[0].keys():
        assert same_row(ranks.owner(key).get(key), alone.buffers[0].get(key))
    with pytest.raises(ValueError, match="must have the outputs, with 8 entries"):
        alone.buffers[0].insert(rows(1), own_outputs=8)
    ranks.close()
    alone.close()


def test_ranks_count_versions_alike_in_whatever_order_they_open_the_folder(tmp_path):
    ranks = Ranks(2, tmp_path)
    ranks.insert(rows(20))
    states = [ranks.save(), ranks.save()]
    ranks.insert(rows(20, first=50))
    ranks.save()
    ranks.close()
    resumed = Ranks(2, tmp_path)
    resumed.load(states[0])  # rank 0 has written new files when rank 1 begins
    resumed.insert(rows(20, first=80))
    version = resumed.save()["version"]
    for buffer in resumed.buffers:
        assert buffer.version == version
        buffer.publish(version)
    assert [path.name for path in tmp_path.glob("index-*")] == [f"index-{version + 1:010d}.index"]
    resumed.close()


def test_each_rank_stores_only_its_own_rows(tmp_path):
    ranks = Ranks(4, tmp_path)
    ranks.insert(rows(200))
    stored = []
    for buffer in ranks.buffers:
        for path in tmp_path.glob(f"rows-{buffer.store.shards[0]:04d}-*.segment"):
            blocks = scan(memoryview(path.read_bytes()), path).blocks
            own = [int(p) for block in blocks for p in block.entries["position"]]
            assert all(buffer.rank_of(key) == buffer.rank for key in own)
            stored += own
    assert sorted(stored) == list(range(200))
    ranks.close()


def test_a_rank_on_another_node_says_where_a_foreign_row_lies(tmp_path):
    buffers = [ReplayBuffer(config(), tmp_path / str(rank), rank=rank, world_size=2) for rank in range(2)]
    for buffer in buffers:
        buffer.insert(rows(10))
    foreign = next(key for key in range(10) if buffers[0].rank_of(key) == 1)
    with pytest.raises(ReplayError, match="it lies on rank 1"):
        buffers[0].get(foreign)
    assert buffers[0].length(foreign) == buffers[1].length(foreign)


def test_moving_whole_files_is_all_that_another_number_of_ranks_needs(tmp_path):
    offered = rows(150)
    one = ReplayBuffer(config(), tmp_path / "one")
    one.insert(offered)
    state = one.state_dict()
    one.close()
    for rank in range(2):
        node = tmp_path / f"node{rank}"
        node.mkdir()
        for path in (tmp_path / "one").glob("*.segment"):
            shutil.copy(path, node)
        buffer = ReplayBuffer(config(), node, rank=rank, world_size=2)
        buffer.load_state_dict(state)
        assert all(same_row(buffer.get(key), offered[key]) for key in range(150) if buffer.rank_of(key) == rank)


def test_ranks_with_folders_of_their_own_resume_from_one_ranks_state(tmp_path):
    offered, states = rows(60), []
    for rank in range(2):
        with ReplayBuffer(config(), tmp_path / str(rank), rank=rank, world_size=2) as buffer:
            buffer.insert(offered)
            states.append(buffer.state_dict())
            buffer.insert(rows(10, first=700))
    for rank in range(2):
        with ReplayBuffer(config(), tmp_path / str(rank), rank=rank, world_size=2) as buffer:
            buffer.load_state_dict(states[0])
            assert buffer.keys() == list(range(60))
            assert all(same_row(buffer.get(key), offered[key]) for key in buffer.keys() if buffer.rank_of(key) == rank)
            buffer.publish(buffer.state_dict()["version"])
            assert all(same_row(buffer.get(key), offered[key]) for key in buffer.keys() if buffer.rank_of(key) == rank)


def test_other_settings_are_refused_with_both_values(tmp_path):
    with ReplayBuffer(config(capacity=100), tmp_path, seed=1) as buffer:
        buffer.insert(rows(5))
        state = buffer.state_dict()
    with pytest.raises(ConfigError, match="seed 1, now seed 2"):
        ReplayBuffer(config(capacity=100), tmp_path, seed=2)
    with pytest.raises(ConfigError, match="capacity: 100, now it is 99"):
        ReplayBuffer(config(capacity=99), tmp_path, seed=1)
    with pytest.raises(ConfigError, match=r"policy: reservoir, now it is fifo"):
        ReplayBuffer(config(capacity=100, policy="fifo"), seed=1).load_state_dict(state)
    with pytest.raises(ReplayError, match="segment is missing"):
        ReplayBuffer(config(capacity=100), seed=1).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"temperature': 1.0.*now it is .*temperature': 2.0"):
        ReplayBuffer(config(capacity=100, teacher={"temperature": 2.0}), tmp_path, seed=1)
    with ReplayBuffer(config(), tmp_path / "vocabulary", vocab_size=100) as buffer:
        buffer.insert(rows(1))
    with pytest.raises(ConfigError, match="vocabulary of 100, now it is 101"):
        ReplayBuffer(config(), tmp_path / "vocabulary", vocab_size=101)
    ReplayBuffer(config(capacity=100, draw="mix_cd", rest_steps=4), tmp_path, seed=1).close()  # how to draw may change


# ----------------------------------------------------------------------------------------------------- freeing segments


def test_segments_are_freed_only_after_a_newer_checkpoint_is_published(tmp_path, monkeypatch):
    monkeypatch.setattr("safecl.replay.files.store.SEGMENT_BYTES", 4096)
    settings = config(capacity=60, policy="fifo")
    buffer, random = ReplayBuffer(settings, tmp_path / "memory"), np.random.default_rng(0)
    states, freed, checked = {}, 0, 0
    for number in range(60):
        buffer.insert(rows(int(random.integers(5, 25)), first=100 * number))
        if random.random() < 0.5:
            state = buffer.state_dict()
            states[state["version"]] = (state, buffer.keys())
        if states and random.random() < 0.4:
            kept = [max(states), *(v for v in states if random.random() < 0.3)]
            freed += buffer.publish(max(states), retain=kept)
            states = {v: states[v] for v in set(kept)}
        if number % 6 == 0:
            for state, keys in states.values():  # every checkpoint that still exists can be loaded and read
                shutil.rmtree(tmp_path / "copy", ignore_errors=True)
                shutil.copytree(tmp_path / "memory", tmp_path / "copy")
                with ReplayBuffer(settings, tmp_path / "copy") as loaded:
                    loaded.load_state_dict(state)
                    assert loaded.keys() == keys and len(loaded.get_many(keys)) == len(keys)
                    checked += 1
    assert freed > 0 and checked > 5
    buffer.publish(buffer.state_dict()["version"])
    needed = {buffer.store.name(number) for number in buffer.table["segment"].tolist()}
    open_one = {path.name for path in (tmp_path / "memory").glob("*.segment") if buffer.store.end_of(path.name)}
    assert needed <= {path.name for path in (tmp_path / "memory").glob("*.segment")} <= needed | open_one
    assert buffer.verify() == []


def test_sparse_segments_are_rewritten_so_that_a_long_stream_does_not_fill_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("safecl.replay.files.store.SEGMENT_BYTES", 20_000)
    monkeypatch.setattr("safecl.replay.snapshots.WORTH_BYTES", 1000)
    buffer = ReplayBuffer(config(capacity=50), tmp_path, seed=2)
    offered = rows(4000)
    for start in range(0, 4000, 100):
        buffer.insert(offered[start : start + 100])
        buffer.publish(buffer.state_dict()["version"])
    held = int(buffer.table["nbytes"].sum())
    on_disk = sum(path.stat().st_size for path in tmp_path.glob("*.segment"))
    assert on_disk < 6 * held + 3 * 20_000
    assert all(same_row(buffer.get(key), offered[key]) for key in buffer.keys())
    buffer.close()
    with ReplayBuffer(config(capacity=50), tmp_path, seed=2) as again:
        assert len(again) == 50 and all(same_row(again.get(key), offered[key]) for key in again.keys())


def test_several_ranks_can_always_load_what_one_of_them_saved(tmp_path, monkeypatch):
    monkeypatch.setattr("safecl.replay.files.store.SEGMENT_BYTES", 5_000)
    monkeypatch.setattr("safecl.replay.snapshots.WORTH_BYTES", 500)
    ranks, random = Ranks(2, tmp_path / "memory", capacity=40), np.random.default_rng(0)
    offered = rows(1200)
    for start in range(0, 1200, 60):
        ranks.insert(offered[start : start + 60])
        state = ranks.save()
        for buffer in ranks.buffers[:: int(random.choice([-1, 1]))]:
            buffer.publish(state["version"])
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "memory", tmp_path / "copy")
        with ReplayBuffer(config(capacity=40), tmp_path / "copy", seed=5) as alone:
            alone.load_state_dict(state)
            assert alone.keys() == ranks.buffers[1].keys()
            assert all(same_row(alone.get(key), offered[key]) for key in alone.keys())
    ranks.close()


def test_a_version_that_was_never_saved_is_not_published():
    buffer = ReplayBuffer(config())
    with pytest.raises(ValueError, match="version 7 was not made"):
        buffer.publish(7)
