"""Ranks that safecl starts itself: their variables, the first failure, and signals that end them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from safecl.distributed.spawn import run_ranks


def write_module(folder, code: str) -> dict[str, str]:
    (folder / "rank_module.py").write_text(f"import os, sys, time\nrank = int(os.environ['RANK'])\n{code}\n")
    return {"PYTHONPATH": str(folder)}


def test_ranks_get_a_launchers_variables_and_the_first_failure_ends_them_all(tmp_path, monkeypatch):
    names = "RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT OMP_NUM_THREADS"
    code = f"open(sys.argv[1] + str(rank), 'w').write(' '.join(os.environ[n] for n in '{names}'.split()))"
    monkeypatch.setenv("PYTHONPATH", write_module(tmp_path, code)["PYTHONPATH"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run_ranks("rank_module", [str(tmp_path / "seen")], 2) == 0
    seen = [(tmp_path / f"seen{rank}").read_text().split() for rank in range(2)]
    assert [s[:4] for s in seen] == [["0", "2", "0", "127.0.0.1"], ["1", "2", "1", "127.0.0.1"]]
    assert seen[0][4] == seen[1][4]

    code = (
        "open(sys.argv[1] + str(rank), 'w').write(str(os.getpid()))\n"
        "first = sys.argv[1] + '0'\n"
        "while rank and not (os.path.exists(first) and os.path.getsize(first)): time.sleep(0.01)\n"
        "if rank: sys.exit(7)\n"
        "time.sleep(600)"
    )
    write_module(tmp_path, code)
    assert run_ranks("rank_module", [str(tmp_path / "pid")], 2) == 7
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid{rank}").read_text()), 0)


PROGRAM = """
import sys
from safecl import exits
from safecl.distributed import signals, spawn
exits.SECONDS_TO_END, signals.SECONDS_BEFORE_A_SECOND_COUNTS = 0.2, 0.0
with exits.endings_as_exit_codes("demo"):
    spawn.run_ranks("rank_module", [sys.argv[1]], 2, grace=600.0)
"""


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Start a parent with two ranks that run some code, and return it when both have written the file `up<rank>`. No
    process outlives the test."""
    started = []

    def start_one(code: str) -> subprocess.Popen[str]:
        environment = os.environ | write_module(tmp_path, code)
        environment["PYTHONPATH"] += os.pathsep + str(Path(__file__).parents[2])
        command = [sys.executable, "-c", PROGRAM, str(tmp_path) + os.sep]
        parent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment)
        started.append(parent)
        wait_for(parent, *(tmp_path / f"up{rank}" for rank in range(2)))
        return parent

    yield start_one
    for parent in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)


def wait_for(parent: subprocess.Popen[str], *files: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in files):
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def assert_ended(parent: subprocess.Popen[str], name: str) -> None:
    _, err = parent.communicate(timeout=60)
    assert parent.returncode == 75 and err.count(f"{name} ended `safecl demo`") == 1 and "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.killpg(parent.pid, 0)


UP = "open(sys.argv[1] + 'up' + str(rank), 'w').close()\n"


def test_ctrl_c_ends_all_ranks_with_one_message(start):
    """Ctrl-C reaches the parent and every rank, also in the middle of their imports. Only the parent prints."""
    parent = start(UP + "time.sleep(600)")
    os.killpg(parent.pid, signal.SIGINT)
    assert_ended(parent, "Ctrl-C")


SAVING = """
import signal
def save(*_):
    open(sys.argv[1] + 'saving' + str(rank), 'w').close()
    while not os.path.exists(sys.argv[1] + 'go'): time.sleep(0.02)
    open(sys.argv[1] + 'saved' + str(rank), 'w').close()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ranks_have_time_to_save_and_the_parent_waits_longer_than_a_verb_does(start, tmp_path, number):
    parent = start(SAVING + UP + "time.sleep(600)")
    os.kill(parent.pid, number)
    wait_for(parent, *(tmp_path / f"saving{rank}" for rank in range(2)))
    time.sleep(0.5)  # more than SECONDS_TO_END
    assert parent.poll() is None
    (tmp_path / "go").touch()
    assert_ended(parent, "Ctrl-C" if number == signal.SIGINT else "SIGTERM")
    assert all((tmp_path / f"saved{rank}").exists() for rank in range(2))


def test_a_second_ctrl_c_kills_ranks_that_save(start, tmp_path):
    parent = start(SAVING + UP + "time.sleep(600)")
    os.kill(parent.pid, signal.SIGINT)
    wait_for(parent, *(tmp_path / f"saving{rank}" for rank in range(2)))
    os.kill(parent.pid, signal.SIGTERM)  # a launcher passes the stop on: it does not insist
    time.sleep(0.3)
    assert parent.poll() is None
    os.kill(parent.pid, signal.SIGINT)
    assert_ended(parent, "Ctrl-C")
    assert not list(tmp_path.glob("saved*"))
