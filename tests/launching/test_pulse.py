"""Signs of life of the agents: one that stops, or says that it has failed, is lost; one that is done is not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from safecl.launching import pulse
from safecl.launching.pulse import Pulse


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch):
    monkeypatch.setattr(pulse, "SECONDS_BETWEEN_BEATS", 0.0)


def pair(folder: Path) -> tuple[Pulse, Pulse]:
    agents = Pulse(folder, "a-1"), Pulse(folder, "b-1")
    for agent in agents:
        agent.begin()
    for agent in agents * 2:
        assert agent.lost() is None
    return agents


def age(folder: Path, name: str, seconds: float) -> None:
    """Let the last sign of an agent be older; it is the one that was seen."""
    found = (folder / name).stat().st_mtime - seconds
    os.utime(folder / name, (found, found))


def test_an_agent_without_a_sign_for_20_seconds_is_lost(tmp_path):
    a, b = pair(tmp_path)
    age(tmp_path, "b-1", 10.0)
    assert a.lost() is None
    age(tmp_path, "b-1", 15.0)
    assert a.lost() == "the agent b-1 gives no sign of life since 25 s"
    assert b.lost() is None  # it has just given one


def test_an_agent_that_was_asleep_itself_gives_the_others_time_for_a_sign(tmp_path):
    a, _ = pair(tmp_path)
    age(tmp_path, "b-1", 60.0)
    a._beaten_at -= 60.0
    assert a.lost() is None
    assert a.lost() == "the agent b-1 gives no sign of life since 60 s"


def test_an_agent_that_has_failed_is_lost_and_one_that_is_done_is_not(tmp_path):
    a, b = pair(tmp_path)
    b.end(failed=True)
    age(tmp_path, "b-1", 9.0)
    assert a.lost() is None
    age(tmp_path, "b-1", 2.0)
    assert a.lost() == "the ranks of the agent b-1 failed 11 s ago"
    a, b = pair(tmp_path / "again")
    b.end(failed=False)
    assert a.lost() is None


def test_signs_of_agents_that_are_gone_since_long_do_not_count(tmp_path):
    (tmp_path / "c-9").write_text("failed")
    age(tmp_path, "c-9", 500.0)
    a, b = pair(tmp_path)
    assert a.lost() is None and b.lost() is None


def test_an_agent_of_one_node_leaves_no_sign(tmp_path):
    alone = Pulse(None)
    alone.begin()
    assert alone.lost() is None
    alone.end(failed=True)
