"""A rank that hangs is named with its host, phase and last collective call, and the job ends; slow work and pauses are
left alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import pytest

from safecl.distributed import ending, environment, hearts
from safecl.distributed.hearts import Heartbeat, Member, describe, judge
from safecl.distributed.progress import Progress, step_limit
from tests.distributed import hang_scenes
from tests.distributed.test_stopping import materials, tree, what_is_left  # noqa: F401
from tests.pool import RankPool

CODES = {
    "sleeps": (1,),
    "is stopped": (-ending.STACKS,),
    "keeps the lock": (-ending.STACKS, -signal.SIGKILL),
}
"""The exit codes of a rank that hangs, by how it hangs."""


def heart(number: int = 5, waits: bool = True, ticks: int = 1, phase: str = "step") -> Heartbeat:
    return Heartbeat(phase, 3.0, 2.0, f"all_reduce, number {number}", number, waits, ticks)


# ------------------------------------------------------------------------------------------------------ who is guilty


def test_a_rank_whose_heart_stands_still_is_guilty_whatever_the_others_do():
    before = {0: heart(ticks=1), 1: heart(ticks=1), 2: heart(waits=False)}
    after = {0: heart(ticks=2), 1: heart(ticks=1), 2: heart(waits=False, ticks=2)}
    assert judge(before, after) == (1,)
    assert judge(before, {**after, 1: None}) == (1,)


def test_else_the_rank_that_is_in_no_collective_call_while_others_wait_in_one():
    before = {rank: heart() for rank in range(3)}
    assert judge(before, {0: heart(ticks=2), 1: heart(waits=False, ticks=2), 2: heart(ticks=2)}) == (1,)


def test_else_the_rank_whose_call_has_the_lowest_number_and_else_all():
    before = {rank: heart() for rank in range(3)}
    assert judge(before, {0: heart(6, ticks=2), 1: heart(5, ticks=2), 2: heart(6, ticks=2)}) == (1,)
    assert judge(before, {rank: heart(ticks=2) for rank in range(3)}) == (0, 1, 2)
    assert judge({0: heart()}, {0: heart(waits=False, ticks=2)}) == (0,)


def test_a_rank_is_described_by_host_process_phase_and_call():
    member = Member(3, "gpu-07", 4711, "99", "")
    assert describe(member, heart(532)) == (
        "rank 3 on gpu-07 (process 4711) hangs in the phase step, waits in all_reduce, number 532"
    )
    assert "gives no sign of life" in describe(member, heart(), silent=True)
    assert "last seen in the phase step, collective call all_reduce, number 5" in describe(member, heart(), silent=True)


def test_a_step_may_take_ten_medians_and_a_minute_and_half_an_hour_while_kernels_are_compiled():
    assert step_limit("auto", [2.0, 3.0, 90.0]) == 90.0
    assert step_limit("auto", [2.0, 3.0]) == 1800.0
    assert step_limit(7.0, []) == 7.0 and step_limit("never", [1.0] * 9) == float("inf")
    progress = Progress(phase="evaluation", timeout="never")
    assert progress.limit() == float("inf")


def test_a_process_is_told_from_a_later_one_with_its_number():
    own = hearts.this_member("")
    assert own.is_alive and not Member(0, own.host, own.process, "1", "").is_alive


# ------------------------------------------------------------------------------------------------------- real processes


def start(scene, place: Path, **arguments) -> RankPool:
    pool = RankPool(2, forked=True)
    for pipe in pool.pipes:
        pipe.send((scene, arguments | {"said": str(place / "said")}))
    return pool


def ends(pool: RankPool, seconds: float = 40.0) -> list[int | None]:
    deadline = time.monotonic() + seconds
    for process in pool.processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in pool.processes]
    pool.close()
    return codes


def wait_for(*paths: Path, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, paths
        time.sleep(0.02)


def said(folder: Path) -> str:
    return "".join((folder / f"said-{rank}").read_text() for rank in range(2))


@pytest.mark.parametrize(
    ("how", "rank", "where"),
    [
        pytest.param("sleeps", 1, "step", marks=pytest.mark.long),
        pytest.param("is stopped", 1, "evaluation", marks=pytest.mark.long),
        ("is stopped", 0, "step"),  # the store of all ranks is in its process
        pytest.param("keeps the lock", 1, "step", marks=pytest.mark.long),
        pytest.param("keeps the lock", 0, "step", marks=pytest.mark.long),
        pytest.param("sleeps", 0, "evaluation", marks=pytest.mark.long),
    ],
)
def test_a_rank_that_hangs_is_named_and_both_ranks_end_with_their_stacks_written(tmp_path, how, rank, where):
    pool = start(hang_scenes.loop, tmp_path, folder=str(tmp_path), how=how, rank=rank, where=where)
    processes = [each.pid for each in pool.processes]
    codes = ends(pool)
    assert codes[1 - rank] == 1 and codes[rank] in CODES[how]
    message = said(tmp_path)
    assert message.count("safecl: failed") == 1 and f"in the phase {where} (limit 1 s" in message
    assert f"rank {rank} on {os.uname().nodename} (process {processes[rank]})" in message
    assert "others wait in all_reduce, number" in message and "the same command resumes" in message
    (hang,) = (tmp_path / "hangs").iterdir()
    stacks = [(hang / f"stacks-{number:05d}.txt").read_text() for number in range(2)]
    assert "hang_scenes.py" in stacks[0] and "hang_scenes.py" in stacks[1] and "all_reduce" in stacks[1 - rank]
    calls = json.loads((hang / f"collectives-{1 - rank:05d}.json").read_bytes())["entries"]
    assert calls[-1]["profiling_name"] == "gloo:all_reduce" and not calls[-1]["retired"]
    left = [path.name for path in Path("/dev/shm").iterdir() if any(str(each) in path.name for each in processes)]
    assert not left and not any(Path(f"/proc/{each}").exists() for each in processes)


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (
            (0, 2),
            r"rank 1 of 3 has not joined within 10 s; there: ranks 0, 2 on {host}\. Each must run, and reach rank 0",
        ),
        pytest.param(
            (1,),
            r"rank 1 has not found the others: .*\. Each of the 3 ranks must run, and reach rank 0 at 127\.0\.0\.1",
            marks=pytest.mark.long,
        ),
        ((0, 1, 2), "joined 3"),
    ],
)
def test_ranks_that_never_join_are_named_by_those_that_are_there(tmp_path, there, said):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    arguments = (3, environment.free_port(), 90.0 if len(there) == 3 else 10.0)
    processes = [
        context.Process(target=hang_scenes.join, args=(str(tmp_path), rank, *arguments), daemon=True) for rank in there
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    found = [(tmp_path / f"said-{rank}").read_text() for rank in there]
    assert re.match(said.format(host=re.escape(os.uname().nodename)), found[0]), found
    assert len(there) == 3 or not any(text.startswith("joined") for text in found)


def test_slow_work_slow_evaluations_and_a_pause_of_the_whole_job_are_no_hang(tmp_path):
    pool = start(hang_scenes.pause_and_slow_work, tmp_path, folder=str(tmp_path))
    wait_for(*(tmp_path / f"said-ready-{rank}" for rank in range(2)))
    for process in pool.processes:
        os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2.0)
    for process in pool.processes:
        os.kill(process.pid, signal.SIGCONT)
    wait_for(*(tmp_path / f"said-{rank}-finished" for rank in range(2)), seconds=20)
    pool.close()
    assert said(tmp_path) == "" and not (tmp_path / "hangs").exists()


@pytest.mark.parametrize(
    ("signals", "code", "message"),
    [
        pytest.param(["SIGTERM"], 1, "SIGTERM came, and there was no progress for", marks=pytest.mark.long),
        (["SIGINT", "SIGINT"], 75, "stopped: Ctrl-C twice, in the phase step"),
    ],
)
def test_signals_work_while_another_rank_hangs(tmp_path, signals, code, message):
    pool = start(hang_scenes.loop, tmp_path, folder=str(tmp_path), how="waits for a signal", rank=1)
    wait_for(*(tmp_path / f"said-process-{rank}" for rank in range(2)))
    time.sleep(1.5)
    for name in signals:
        os.kill(pool.processes[0].pid, getattr(signal, name))
        time.sleep(1.2)
    assert ends(pool, 12.0)[0] == code
    assert message in said(tmp_path)


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize(
    ("where", "how", "rank"),
    [
        ("step", "is stopped", 1),
        *(
            pytest.param(where, how, rank, marks=pytest.mark.long)
            for where, how, rank in [
                ("step", "is stopped", 0),
                ("step", "keeps the lock", 1),
                ("collective start", "sleeps", 1),
                ("load", "sleeps", 1),
                ("preparation", "sleeps", 0),
                ("evaluation", "is stopped", 0),
                ("save", "sleeps", 1),
                ("export", "sleeps", 0),
            ]
        ),
    ],
)
def test_a_run_in_which_a_rank_hangs_ends_and_resumes(rank_pool, materials, tmp_path, where, how, rank):  # noqa: F811
    config = tree(materials, tmp_path / "run", methods={"er": {}}, checkpoint={"every": 2})
    config["tasks"], config["train"] = config["tasks"][1:], config["train"] | {"hang_timeout": 3}
    config["safety"] = config["safety"] | {"every": "task"}
    arguments = dict(tree=config, cache=str(materials / "cache"), rank=rank, where=where, how=how, limit=3.0)
    codes = ends(start(hang_scenes.fit_and_hang, tmp_path, **arguments), 120.0)
    assert codes[1 - rank] == 1 and codes[rank] in CODES[how]
    assert not (tmp_path / "run" / "results.json").exists(), "a rank that was woken has finished the run"
    message = said(tmp_path)
    assert f"rank {rank} on" in message and f"in the phase {where} (limit 3 s" in message
    assert len(list((tmp_path / "run" / "hangs").glob("*/stacks-*.txt"))) == 2
    config["train"] = config["train"] | {"hang_timeout": "auto"}
    saved = any((tmp_path / "run" / "checkpoints").glob("step-*"))
    again = rank_pool(2).run(hang_scenes.stop_scenes.fit, tree=config, cache=str(materials / "cache"))
    assert again[0]["results"]["steps"] == 5
    assert not saved or "resuming from step-" in again[0]["said"]  # a rank may have hung before its part was written


@pytest.mark.long
@pytest.mark.parametrize("paused", [(1,), (0, 1)])
def test_a_pause_of_15_seconds_changes_no_bit(rank_pool, materials, tmp_path, paused):  # noqa: F811
    def config(name: str) -> dict:
        found = tree(materials, tmp_path / name, methods={"er": {}, "ema": {"decay": 0.7}}, safety=None)
        return found | {"tasks": found["tasks"][1:]}

    rank_pool(2).run(hang_scenes.stop_scenes.fit, tree=config("whole"), cache=str(materials / "cache"))
    pool = start(hang_scenes.fit_slowly, tmp_path, tree=config("paused"), cache=str(materials / "cache"))
    wait_for(tmp_path / "said-step-2-1", seconds=120)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in paused:
            os.kill(pool.processes[rank].pid, number)
        time.sleep(15 if number == signal.SIGSTOP else 0)
    wait_for(*(tmp_path / f"said-{rank}-finished" for rank in range(2)), seconds=120)
    pool.close()
    assert said(tmp_path) == "" and what_is_left(tmp_path / "paused") == what_is_left(tmp_path / "whole")


@pytest.mark.long
def test_a_clock_that_jumps_changes_no_bit(rank_pool, materials, tmp_path):  # noqa: F811
    def config(name: str) -> dict:
        found = tree(materials, tmp_path / name, methods={"er": {}, "ema": {"decay": 0.7}}, safety=None)
        return found | {"tasks": found["tasks"][1:]}

    rank_pool(2).run(hang_scenes.stop_scenes.fit, tree=config("whole"), cache=str(materials / "cache"))
    rank_pool(2).run(hang_scenes.fit_with_a_clock_that_jumps, tree=config("jumping"), cache=str(materials / "cache"))
    assert what_is_left(tmp_path / "jumping") == what_is_left(tmp_path / "whole")
