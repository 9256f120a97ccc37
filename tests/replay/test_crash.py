"""Kills, cuts, flipped bytes, full disks and second writers."""

from __future__ import annotations

import os
import resource
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from safecl.config import ConfigError
from safecl.replay import ReplayBuffer
from safecl.replay.files.lock import BufferInUse
from safecl.replay.rows import ReplayError
from tests.replay.samples import config, rows, same_row, with_teacher


def insert_and_tell(folder: Path, offered: list, pipe: int) -> None:
    """Insert one to eight rows at a time, with flushes and checkpoints in between. Writes the number of rows inserted
    to the pipe after each insertion."""
    buffer = ReplayBuffer(config(capacity=10_000), folder)
    done = buffer.num_seen
    while done < len(offered):
        portion = offered[done : done + 1 + done % 8]
        buffer.insert(portion)
        done += len(portion)
        os.write(pipe, struct.pack("<q", done))
        if done % 5 == 0:
            buffer.flush()
        if done % 7 == 0:
            buffer.publish(buffer.state_dict()["version"])


def run_until_killed(folder: Path, offered: list, answers: int, seconds: float) -> int:
    """Kill an inserting child `seconds` after its first `answers` reports. Returns the last number that it reported."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            insert_and_tell(folder, offered, write)
        finally:
            os._exit(0)
    os.close(write)
    told = b""
    while len(told) < 8 * answers and (piece := os.read(read, 8)):
        told += piece
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while piece := os.read(read, 65536):
        told += piece
    os.close(read)
    return struct.unpack("<q", told[-8:])[0] if told else 0


@pytest.mark.parametrize("kills", [40, pytest.param(200, marks=pytest.mark.long)])
def test_kill_9_at_random_instants_loses_nothing_but_the_rows_in_flight(tmp_path, kills):
    offered = [with_teacher(row) if i % 3 == 0 else row for i, row in enumerate(rows(3000))]
    random, reached = np.random.default_rng(0), 0
    for kill in range(kills):
        if kill % 50 == 0:
            folder, reached = tmp_path / str(kill), 0
        acknowledged = run_until_killed(folder, offered, int(random.integers(0, 3)), float(random.exponential(0.002)))
        with ReplayBuffer(config(capacity=10_000), folder, mode="read") as buffer:
            keys = buffer.keys()
            assert buffer.problems == []
            assert keys == list(range(len(keys))) and buffer.num_seen == len(keys)
            assert max(reached, acknowledged) <= len(keys) <= max(reached, acknowledged) + 8
            checked = keys if kill % 10 == 0 else keys[-40:]
            assert all(same_row(row, offered[key]) for key, row in zip(checked, buffer.get_many(checked), strict=True))
        reached = len(keys)


# --------------------------------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> tuple[dict[str, bytes], list]:
    """Files of a small memory of two segments, and its rows."""
    folder = tmp_path_factory.mktemp("healthy")
    offered = [with_teacher(row) if i % 2 else row for i, row in enumerate(rows(40))]
    for part in (offered[:25], offered[25:]):
        with ReplayBuffer(config(), folder) as buffer:
            buffer.insert(part)
    with ReplayBuffer(config(), folder) as buffer:
        buffer.publish(buffer.state_dict()["version"])
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}, offered


def write_all(folder: Path, files: dict[str, bytes]) -> None:
    for old in folder.iterdir():
        old.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def read_everything(folder: Path, offered: list) -> tuple[bool, int]:
    """Return (whether damage was reported, number of rows read right). Fails when a wrong row is returned."""
    told, right = False, 0
    with ReplayBuffer(config(), folder, mode="read") as buffer:
        told |= bool(buffer.problems)
        for key in range(len(offered)):
            try:
                row = buffer.get(key)
            except (ReplayError, KeyError):
                told = True
                continue
            assert same_row(row, offered[key]), f"row {key} was returned damaged"
            right += 1
        told |= bool(buffer.verify())
    return told, right


def test_500_random_flips_and_cuts_are_all_detected_and_never_returned(tmp_path, healthy):
    files, offered = healthy
    random = np.random.default_rng(1)
    names = sorted(files)
    weights = np.array([len(files[name]) ** 0.5 for name in names])
    for number in range(500):
        name = names[random.choice(len(names), p=weights / weights.sum())]
        data = bytearray(files[name])
        if number % 4 == 0:
            data = data[: random.integers(0, len(data))]
        else:
            data[random.integers(0, len(data))] ^= 1 << int(random.integers(0, 8))
        write_all(tmp_path, files | {name: bytes(data)})
        told, right = read_everything(tmp_path, offered)
        assert told, f"damage number {number} in {name} was not detected"
        if number % 4:  # one flipped byte costs a row at most; a block's rows where the index is gone too
            assert right >= len(offered) - 1


def test_without_any_index_a_flipped_byte_is_still_detected_and_costs_one_block_at_most(tmp_path, healthy):
    files, offered = healthy
    files = {name: data for name, data in files.items() if name.endswith(".segment")}
    random = np.random.default_rng(2)
    for name in [sorted(files)[i % 2] for i in range(100)]:
        data = bytearray(files[name])
        data[random.integers(0, len(data))] ^= 1 << int(random.integers(0, 8))
        write_all(tmp_path, files | {name: bytes(data)})
        told, right = read_everything(tmp_path, offered)
        assert told and right >= 15


def test_repair_lets_go_of_damaged_rows_and_keeps_the_others(tmp_path, healthy):
    files, offered = healthy
    write_all(tmp_path, files)
    with ReplayBuffer(config(), tmp_path, mode="read") as buffer:
        row = buffer.table.find_one(7)
        segment, at = buffer.store.name(int(buffer.table["segment"][row])), int(buffer.table["offset"][row])
    data = bytearray(files[segment])
    data[at + 3] ^= 255
    (tmp_path / segment).write_bytes(bytes(data))
    with ReplayBuffer(config(), tmp_path) as buffer:
        with pytest.raises(ReplayError, match=r"row 7 at byte .* is damaged"):
            buffer.get(7)
        assert any("row 7" in problem for problem in buffer.verify(repair=True))
        assert buffer.keys() == [key for key in range(40) if key != 7]
        assert all(same_row(buffer.get(key), offered[key]) for key in buffer.keys())


def test_a_missing_segment_is_told_and_the_rest_goes_on(tmp_path, healthy):
    files, offered = healthy
    lost = max((name for name in files if name.endswith(".segment")), key=lambda name: len(files[name]))
    write_all(tmp_path, {name: data for name, data in files.items() if name != lost})
    with ReplayBuffer(config(), tmp_path) as buffer:
        assert [problem for problem in buffer.problems if lost in problem and "missing" in problem]
        with pytest.raises(ReplayError, match="its segment is missing or cut"):
            buffer.get_many(buffer.keys())
        buffer.insert(offered[:5])
    with ReplayBuffer(config(), tmp_path) as buffer:
        assert buffer.verify(repair=True)
        assert 5 < len(buffer) < 45 and len(buffer.get_many(buffer.keys())) == len(buffer)


def test_a_checkpoint_refuses_a_segment_that_changed(tmp_path, healthy):
    files, _ = healthy
    write_all(tmp_path, files)
    with ReplayBuffer(config(), tmp_path) as buffer:
        state = buffer.state_dict()
    segment = next(path for path in tmp_path.glob("*.segment") if path.stat().st_size > 500)
    data = bytearray(segment.read_bytes())
    data[300] ^= 1
    segment.write_bytes(bytes(data))
    with ReplayBuffer(config(), tmp_path) as buffer, pytest.raises(ReplayError, match="changed since the checkpoint"):
        buffer.load_state_dict(state)
    damaged = {**state, "index": state["index"].copy()}
    damaged["index"][100] ^= 1
    with ReplayBuffer(config(), tmp_path) as buffer, pytest.raises(ReplayError, match="index is damaged"):
        buffer.load_state_dict(damaged)


def test_an_index_made_to_deceive_is_refused(tmp_path):
    import json

    import xxhash

    with ReplayBuffer(config(), tmp_path) as buffer:
        buffer.insert(rows(5))
        state = buffer.state_dict()
    data = state["index"].tobytes()
    end = 16 + struct.unpack("<Q", data[8:16])[0]
    header = json.loads(data[16:end])
    for change in (
        {"segments": [["../../outside.segment", 10, "00"]]},
        {"ignored": ["/etc/passwd"]},
        {"num_rows": 10**9},
        {"num_rows": -1},
        {"columns": [["position", "|O"]]},
        {"format": 2},
        {"settings": None},
    ):
        text = json.dumps(header | change).encode()
        text += b" " * (-(len(text) + 16) % 64)
        forged = data[:8] + struct.pack("<Q", len(text)) + text + data[end:-16]
        forged += xxhash.xxh3_128_digest(forged)
        with ReplayBuffer(config(), tmp_path) as buffer, pytest.raises(ReplayError):
            buffer.load_state_dict({"version": state["version"], "index": np.frombuffer(forged, np.uint8)})
        with ReplayBuffer(config(), tmp_path) as buffer:  # what was refused left no trace
            assert len(buffer.get_many(buffer.keys())) == 5 and buffer.problems == []


# ---------------------------------------------------------------------------------------------------------- two writers


def test_the_second_of_two_processes_that_open_a_memory_for_writing_is_refused(tmp_path):
    with ReplayBuffer(config(), tmp_path) as buffer:
        buffer.insert(rows(3))
        buffer.flush()
        script = f"from tests.replay.samples import *; ReplayBuffer(config(), {str(tmp_path)!r})"
        second = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2]
        )
        assert f"process {os.getpid()} on" in second.stderr and "BufferInUse" in second.stderr and second.returncode
        with pytest.raises(BufferInUse):
            ReplayBuffer(config(), tmp_path)
        assert issubclass(BufferInUse, ConfigError)
        with ReplayBuffer(config(), tmp_path, mode="read") as reader:
            assert len(reader) == 3
            with pytest.raises(ValueError, match="read-only"):
                reader.insert(rows(1))
    ReplayBuffer(config(), tmp_path).close()


def test_ranks_may_write_side_by_side_but_not_into_each_others_shards(tmp_path):
    first = ReplayBuffer(config(), tmp_path, rank=0, world_size=2)
    second = ReplayBuffer(config(), tmp_path, rank=1, world_size=2)
    with pytest.raises(BufferInUse):
        ReplayBuffer(config(), tmp_path, rank=1, world_size=4)
    first.close()
    third = ReplayBuffer(config(), tmp_path, rank=1, world_size=4)
    third.close()
    second.close()


# ------------------------------------------------------------------------------------------------------------ disk full


def in_child(work) -> str:
    """Return `work()`, computed in a child process whose limits do not apply to this one."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            result = work()
        except BaseException as error:
            result = f"{type(error).__name__}: {error}"
        os.write(write, str(result).encode()[:4000])
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    result = os.read(read, 65536).decode()
    os.close(read)
    return result


def test_a_full_disk_is_told_and_leaves_the_memory_intact(tmp_path):
    offered = rows(400, length=200)

    def fill() -> str:
        buffer = ReplayBuffer(config(), tmp_path)
        buffer.insert(offered[:20])
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        told, done = "", 20
        try:
            for row in offered[20:]:
                buffer.insert([row])
                done += 1
        except ReplayError as error:
            told = str(error)
        assert len(buffer) == done and all(same_row(buffer.get(key), offered[key]) for key in range(done))
        buffer.flush()
        try:
            buffer.insert(offered[done : done + 5])
        except ReplayError:
            pass
        assert len(buffer) == done
        return f"{done} {told}"

    result = in_child(fill)
    done = int(result.split()[0])
    assert 30 < done < 45 and "File too large while writing" in result and "rows inserted before are intact" in result
    with ReplayBuffer(config(), tmp_path) as buffer:
        assert buffer.problems == [] and buffer.verify() == []
        assert buffer.keys() == list(range(done))
        buffer.insert(offered[done:])
        assert all(same_row(buffer.get(key), offered[key]) for key in range(400))


def test_a_disk_that_takes_half_of_a_write_leaves_the_memory_intact(tmp_path, monkeypatch):
    offered = rows(30)
    buffer = ReplayBuffer(config(), tmp_path)
    buffer.insert(offered[:10])
    real, calls = os.write, []

    def half_then_full(file, data):
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return real(file, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", half_then_full)
    with pytest.raises(ReplayError, match="No space left on device"):
        buffer.insert(offered[10:20])
    monkeypatch.undo()
    assert len(buffer) == 10 and buffer.num_seen == 10
    buffer.insert(offered[10:])
    buffer.close()
    with ReplayBuffer(config(), tmp_path) as again:
        assert all(same_row(again.get(key), row) for key, row in enumerate(offered)) and again.verify() == []


def test_an_index_that_cannot_be_written_leaves_the_last_one(tmp_path):
    def fill() -> str:
        buffer = ReplayBuffer(config(), tmp_path)
        buffer.insert(rows(50, length=4))
        buffer.flush()
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            buffer.flush()
        except ReplayError as error:
            return str(error)
        return "no error"

    assert "the index before it is intact" in in_child(fill)
    with ReplayBuffer(config(), tmp_path) as buffer:
        assert len(buffer) == 50 and buffer.problems == []
        assert not list(tmp_path.glob("*.writing"))
