"""The agent: exit codes arrive, signals reach the ranks, failures are repeated, no process is left."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from safecl.distributed import rank_files
from safecl.launching.agent import Agent, Reach
from safecl.launching.job import Command
from tests.launching import stand_in
from tests.launching.hosts import wait_for


def agent_of(tmp_path: Path, ways: str, **settings) -> Agent:
    files = tmp_path / "files"
    command = Command((sys.executable, stand_in.__file__, "launch", ways), {rank_files.FILES: str(files)})
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    return Agent(command, files, tmp_path / "exit_code", ranks=len(ways.split(",")), **settings)


@pytest.mark.parametrize(
    ("ways", "code"),
    [
        ("0,0", 0),
        ("75,75", 75),
        ("3,75", 3),  # the launcher stops the others when the first has ended
        ("75,2", 2),
        ("1,75", 1),
        ("75,killed", 1),
        ("killed,killed", 1),
    ],
)
def test_the_exit_code_of_the_ranks_arrives_though_the_launcher_ends_with_1(tmp_path, ways, code):
    assert agent_of(tmp_path, ways).run() == code


@pytest.mark.parametrize(("ways", "code"), [("explains,explains", 2), ("saves,saves", 75)])
def test_a_launcher_adds_nothing_to_what_a_rank_has_explained(tmp_path, capfd, ways, code):
    assert agent_of(tmp_path, ways).run() == code
    assert "the launcher's own traceback" not in capfd.readouterr().out


def test_a_launcher_that_stops_the_ranks_of_several_nodes_may_start_them_again(tmp_path, capfd):
    assert agent_of(tmp_path, "saves,saves", signs=tmp_path / "agents").run() == 75
    assert "the launcher's own traceback" in capfd.readouterr().out


def test_a_launcher_reports_a_failure(tmp_path, capfd):
    assert agent_of(tmp_path, "1,75").run() == 1
    assert "the launcher's own traceback" in capfd.readouterr().out


def test_a_failure_is_repeated_and_a_wrong_config_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr("safecl.launching.agent._SECONDS_BEFORE_A_RESTART", 0.0)
    said: list[str] = []
    assert agent_of(tmp_path, "failed-once", max_restarts=2, say=said.append).run() == 0
    assert said == ["safecl launch: the ranks failed; starting them again from the last checkpoint (1 more restart)"]
    assert agent_of(tmp_path, "2", max_restarts=2, say=said.append).run() == 2
    assert agent_of(tmp_path, "1", max_restarts=1, say=said.append).run() == 1
    assert len(said) == 2


def test_a_signal_reaches_every_rank_and_leaves_the_launcher_alone(tmp_path):
    agent, ranks = agent_of(tmp_path, "wait,wait"), tmp_path / "files"

    def stop() -> None:
        wait_for(lambda: len(list(ranks.glob("*.pid"))) == 2, 30, "the ranks begin")
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert agent.run() == 75
    thread.join()
    assert [(ranks / f"came-{rank}").read_text() for rank in (0, 1)] == [str(int(signal.SIGTERM))] * 2


@pytest.mark.parametrize("way", ["stays", "is-stopped"])
def test_a_rank_that_the_launcher_has_lost_is_ended(tmp_path, way):
    assert agent_of(tmp_path, way).run() == 1
    (pid,) = [int(path.read_text()) for path in (tmp_path / "files").glob("*.pid")]
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), 10, "the rank is gone")


def test_ranks_end_when_the_first_node_cannot_be_reached_any_more(tmp_path, monkeypatch):
    monkeypatch.setattr("safecl.launching.agent.SECONDS_TO_BE_LOST", 0.5)
    monkeypatch.setattr("safecl.launching.agent._SECONDS_BETWEEN_LOOKS", 0.1)
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as first:
        place = first.getsockname()
        agent = agent_of(tmp_path, "wait,wait", first_node=place, say=said.append)
        unplugged = threading.Thread(target=lambda: (time.sleep(2.0), first.close()))
        unplugged.start()
        assert agent.run() == 1
        unplugged.join()
    assert f"the first node (127.0.0.1:{place[1]}) cannot be reached for" in said[0]
    for path in (tmp_path / "files").glob("*.pid"):
        wait_for(lambda path=path: not Path(f"/proc/{path.read_text().strip()}").exists(), 10, "the ranks are gone")


def test_one_look_that_fails_after_a_long_sleep_does_not_make_the_first_node_lost(monkeypatch):
    monkeypatch.setattr("safecl.launching.agent._SECONDS_BETWEEN_LOOKS", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as first:
        reach = Reach(first.getsockname())
        assert reach.lost_for() == 0.0
    reach._looked_at -= 3600.0
    assert reach.lost_for() < 1.0
    time.sleep(0.2)
    assert 0.2 <= reach.lost_for() < 60.0


def test_ranks_on_other_machines_leave_their_code_in_the_run_folder(tmp_path):
    command = Command((sys.executable, "-c", "raise SystemExit(1)"))
    (tmp_path / "exit_code").write_text("3\n")
    assert Agent(command, tmp_path / "files", tmp_path / "exit_code").run() == 3
    os.utime(tmp_path / "exit_code", (0, 0))  # of a run before
    assert Agent(command, tmp_path / "files", tmp_path / "exit_code").run() == 1
