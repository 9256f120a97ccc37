"""The cache of teacher outputs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from safecl.config import ConfigError
from safecl.replay import BufferInUse, CacheHeader, CacheReader, CacheWriter, MemoryRow, ReplayBuffer, ReplayError
from tests.replay.samples import config, rows, token_row, with_teacher

HEADER = CacheHeader(model="aa11", tokenizer="bb22", vocab_size=32000, k=8)


def outputs(count: int, first: int = 0):
    return [with_teacher(row) for row in rows(count, first=first)]


def same_outputs(a, b) -> bool:
    return all(
        x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


def fill(folder, made, **place):
    with CacheWriter(folder, HEADER, **place) as writer:
        writer.add([row.row.row_id for row in made], [row.teacher for row in made])


def test_outputs_come_back_bit_by_bit(tmp_path):
    made = outputs(50)
    fill(tmp_path, made)
    reader = CacheReader(tmp_path, HEADER)
    assert len(reader) == 50 and reader.verify() == []
    assert all(same_outputs(reader.get(row.row.row_id), row.teacher) for row in made)
    with pytest.raises(KeyError, match="does not hold row 77"):
        reader.get(77)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "cc33"),
        ("tokenizer", "dd44"),
        ("vocab_size", 32001),
        ("k", 16),
        ("temperature", 2.0),
        ("dtype", "fp32"),
        ("indices", "packed"),
    ],
)
def test_another_header_is_refused_with_both_values(tmp_path, field, value):
    fill(tmp_path, outputs(3))
    expected = dataclasses.replace(HEADER, **{field: value})
    message = f"{field} {getattr(HEADER, field)} in the cache, {value} in this run"
    with pytest.raises(ConfigError, match=message):
        CacheReader(tmp_path, expected)
    with pytest.raises(ConfigError, match=message):
        CacheWriter(tmp_path, expected)


def test_another_format_version_is_refused(tmp_path):
    fill(tmp_path, outputs(3))
    dataclasses.replace(HEADER, format_version=2).write(tmp_path)
    with pytest.raises(ReplayError, match="format version 2, this safecl reads version 1"):
        CacheReader(tmp_path)


def test_a_stopped_build_goes_on_on_another_number_of_ranks(tmp_path):
    made = outputs(90)
    for rank in range(3):
        writer = CacheWriter(tmp_path, HEADER, rank=rank, world_size=3)
        part = made[rank:60:3]
        for row in part[: 10 + rank]:
            writer.add([row.row.row_id], [row.teacher])
        del writer  # killed: nothing is flushed or closed
    for world_size in (2, 1):
        writers = [CacheWriter(tmp_path, HEADER, rank=rank, world_size=world_size) for rank in range(world_size)]
        missing = [row for row in made if not writers[0].has([row.row.row_id])[0]]
        assert len(missing) == (90 - 33 if world_size == 2 else 90 - 33 - 20)
        for i, row in enumerate(missing[:20] if world_size == 2 else missing):
            writers[i % world_size].add([row.row.row_id], [row.teacher])
        for writer in writers:
            writer.close()
    reader = CacheReader(tmp_path, HEADER)
    assert len(reader) == 90 and all(same_outputs(reader.get(row.row.row_id), row.teacher) for row in made)


def test_two_writers_of_one_rank_are_refused(tmp_path):
    with CacheWriter(tmp_path, HEADER, rank=0, world_size=2), pytest.raises(BufferInUse):
        CacheWriter(tmp_path, HEADER, rank=0, world_size=2)


def test_flipped_bytes_anywhere_are_detected_and_never_returned(tmp_path):
    made = outputs(12)
    fill(tmp_path, made)
    random, files = (
        np.random.default_rng(0),
        {p: p.read_bytes() for p in tmp_path.iterdir() if p.suffix in (".json", ".segment")},
    )
    for _ in range(150):
        path = sorted(files)[random.integers(len(files))]
        data = bytearray(files[path])
        data[random.integers(len(data))] ^= 1 << int(random.integers(8))
        path.write_bytes(bytes(data))
        told = False
        try:
            reader = CacheReader(tmp_path, HEADER)
            for row in made:
                try:
                    assert same_outputs(reader.get(row.row.row_id), row.teacher)
                except (KeyError, ReplayError):
                    told = True
            told |= bool(reader.verify())
        except (ConfigError, ReplayError):
            told = True
        assert told or (
            path.suffix == ".json" and CacheHeader.read(tmp_path) == HEADER
        )  # a flip in the JSON's blanks changes nothing
        path.write_bytes(files[path])


def test_outputs_that_do_not_belong_in_the_cache_are_refused(tmp_path):
    row = outputs(1)[0]
    with (
        CacheWriter(tmp_path, dataclasses.replace(HEADER, vocab_size=100)) as writer,
        pytest.raises(ValueError, match="vocabulary of 100"),
    ):
        writer.add([1], [row.teacher])
    with (
        CacheWriter(tmp_path / "k", dataclasses.replace(HEADER, k=4)) as writer,
        pytest.raises(ValueError, match=r"fp16 \[targets, 4\]"),
    ):
        writer.add([1], [row.teacher])


@pytest.mark.parametrize(
    ("vocab", "indices", "limit"), [(150_000, "int32", 400), (150_000, "packed", 336), (32_000, "packed", 272)]
)
def test_an_entry_takes_at_most_400_bytes_a_token_at_k_64(tmp_path, vocab, indices, limit):
    header = CacheHeader("a", "b", vocab, k=64, indices=indices)
    made = [with_teacher(token_row(i, length=40), k=64, vocab=vocab) for i in range(20)]
    with CacheWriter(tmp_path, header) as writer:
        writer.add([row.row.row_id for row in made], [row.teacher for row in made])
    size = sum(path.stat().st_size for path in tmp_path.glob("*.segment"))
    assert size / sum(row.row.num_targets for row in made) <= limit
    reader = CacheReader(tmp_path, header)
    assert all(same_outputs(reader.get(row.row.row_id), row.teacher) for row in made)


def test_a_memory_without_outputs_takes_them_from_the_cache_cut_to_its_prefix(tmp_path):
    made = outputs(20)
    fill(tmp_path, made)
    buffer = ReplayBuffer(config(prefix_tokens=3), teacher_of=CacheReader(tmp_path, HEADER).get)
    buffer.insert(MemoryRow(row.row) for row in made)
    for key, row in enumerate(made):
        held = buffer.get(key)
        assert len(held.teacher.log_tail) == held.row.num_targets == min(3, row.row.num_targets)
        assert np.array_equal(held.teacher.log_probs, row.teacher.log_probs[:3])


def test_no_cache_is_told_with_the_verb_that_builds_one(tmp_path):
    with pytest.raises(ConfigError, match="safecl memory cache"):
        CacheReader(tmp_path)
