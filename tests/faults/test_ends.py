"""Whatever way a run of two ranks ends, nothing of it is left 30 s later: no process, no shared memory, no temporary
folder, no lock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import yaml

from safecl.distributed import environment
from safecl.training.folder import RunFolder
from tests.commands.processes import ROOT
from tests.distributed.test_watchdog import wait_for
from tests.faults import matrix_scenes
from tests.pool import RankPool
from tests.training.test_trainer import materials, tree  # noqa: F401  # materials is a fixture

SECONDS = 30.0
HANG_TIMEOUT = 5
MARK = "SAFECL_TEST_OF_ENDS"


def processes_of(mark: str) -> list[int]:
    """Every living process that has the mark in its environment: the launcher, its ranks, and all that they started."""
    found, line = [], f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        try:
            is_ours = entry.name.isdecimal() and line in (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        found += [int(entry.name)] if is_ours else []
    return found


def ranks_of(mark: str, launcher: int) -> list[int]:
    """The ranks' processes, in the order of their ranks."""
    ranks = {}
    for process in processes_of(mark):
        values = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        rank = [value for value in values if value.startswith(b"RANK=")]
        if process != launcher and rank:
            ranks.setdefault(int(rank[0][5:]), process)
    return [ranks[rank] for rank in sorted(ranks)]


def sigterm(launcher: subprocess.Popen, ranks: list[int]) -> None:
    launcher.send_signal(signal.SIGTERM)


def kill_the_launcher(launcher: subprocess.Popen, ranks: list[int]) -> None:
    launcher.kill()


def kill_a_rank(launcher: subprocess.Popen, ranks: list[int]) -> None:
    os.kill(ranks[1], signal.SIGKILL)


def ctrl_c_twice(launcher: subprocess.Popen, ranks: list[int]) -> None:
    for _ in range(2):  # a terminal sends it to all
        os.killpg(launcher.pid, signal.SIGINT)
        time.sleep(1.2)


def nothing_more(launcher: subprocess.Popen, ranks: list[int]) -> None:
    """The run ends by a fault of its own."""


@pytest.mark.long
@pytest.mark.parametrize(
    ("end", "fault"),
    [
        (sigterm, None),
        (kill_the_launcher, None),
        (kill_a_rank, None),
        (ctrl_c_twice, None),
        (nothing_more, "raises"),
        (nothing_more, "hangs"),
    ],
)
def test_nothing_of_a_run_lives_30_seconds_after_its_end(materials, tmp_path, end, fault):  # noqa: F811
    given = tree(materials, tmp_path / "run", train={"max_steps": 100_000, "hang_timeout": HANG_TIMEOUT})
    del given["safety"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(given | {"checkpoint": {"every": 2}}))
    (tmp_path / "tmp").mkdir()
    mark, shared = uuid.uuid4().hex, set(Path("/dev/shm").iterdir())
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    words += [str(environment.free_port()), "-m", "tests.faults.ending_run", str(tmp_path / "run.yaml"), str(tmp_path)]
    variables = {MARK: mark, "TMPDIR": str(tmp_path / "tmp"), "SAFECL_CACHE": str(materials / "cache")}
    with (tmp_path / "said").open("w") as said:
        launcher = subprocess.Popen(
            words + [fault] * (fault is not None),
            cwd=ROOT, env=os.environ | variables | {"OMP_NUM_THREADS": "1"}, stdout=said, stderr=said,
            start_new_session=True,
        )  # fmt: skip
    try:
        wait_for(tmp_path / "ready-0", tmp_path / "ready-1", seconds=300)
        ranks = ranks_of(mark, launcher.pid)
        assert len(ranks) == 2
        end(launcher, ranks)
        deadline = time.monotonic() + SECONDS + (HANG_TIMEOUT if fault == "hangs" else 0)
        while launcher.poll() is None or processes_of(mark):
            assert time.monotonic() < deadline, (
                f"{processes_of(mark)} live on: {(tmp_path / 'said').read_text()[-3000:]}"
            )
            time.sleep(0.1)
    finally:
        for process in processes_of(mark):
            os.kill(process, signal.SIGKILL)
        launcher.wait()
    mine = [str(process) for process in (launcher.pid, *ranks)]
    left = [path.name for path in set(Path("/dev/shm").iterdir()) - shared]
    assert not [name for name in left if "safecl" in name or any(number in name for number in mine)]
    own = [path.name for path in (tmp_path / "tmp").iterdir() if not path.name.startswith("torchelastic_")]
    assert not own  # torchrun leaves its folder of logs where it is ended
    folder = RunFolder(tmp_path / "run")
    folder.lock()
    folder.release()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_run_that_was_asked_to_stop_ends_when_a_rank_is_killed_in_its_last_save(materials, tmp_path, victim):  # noqa: F811
    given = tree(materials, tmp_path / "run", train={"max_steps": 4}, deepspeed={"stage": 2})
    del given["safety"], given["methods"], given["memory"]
    found = matrix_scenes.kill_in_the_last_save(given, str(materials / "cache"), victim)
    assert found == []


def test_a_rank_that_lives_on_after_a_kill_is_reported(monkeypatch):
    monkeypatch.setattr(matrix_scenes, "SECONDS_TO_LIVE_ON", 1.0)
    pool = RankPool(2, forked=True)
    try:
        pool.run(os.getpid)
        pool.processes[1].kill()
        pool.processes[1].join()
        os.kill(pool.processes[0].pid, signal.SIGSTOP)
        assert matrix_scenes.wrong_ends(pool, 1) == ["rank 0 lives on 1 s after rank 1 was killed"]
    finally:
        pool.close()
