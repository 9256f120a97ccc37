"""The logs of ranks: everything that a rank prints is in its log, and rank 0 is on the console as well."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRINTS = """
import os, sys, signal
from safecl.distributed import rank_files
rank_files.begin(["train", "run.yaml"])
print("a step")
os.write(2, b"from a library in C\\n")
rank_files.tell("safecl: failed\\n")
if len(sys.argv) > 1: os.kill(os.getpid(), signal.SIGKILL)
"""


def rank(number: int, logs: Path, *arguments: str) -> tuple[str, str]:
    env = os.environ | {"RANK": str(number), "SAFECL_RANK_LOGS": str(logs), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PRINTS, *arguments], env=env, capture_output=True, text=True)
    return done.stdout, done.stderr


@pytest.mark.parametrize("arguments", [(), ("killed",)])
def test_rank_0_is_on_the_console_and_in_its_log_also_when_it_is_killed(tmp_path, arguments):
    assert rank(0, tmp_path / "logs", *arguments) == ("a step\n", "from a library in C\n")
    lines = (tmp_path / "logs" / "rank-00000.log").read_text().splitlines()
    assert lines[0].startswith("--- rank 0 on ") and lines[0].endswith(": safecl train run.yaml")
    assert sorted(lines[1:]) == ["a step", "from a library in C"]


def test_another_rank_is_in_its_log_and_only_its_messages_for_people_on_the_console(tmp_path):
    for _ in range(2):
        assert rank(12, tmp_path / "logs") == ("", "safecl: failed\n")
    lines = (tmp_path / "logs" / "rank-00012.log").read_text().splitlines()
    assert lines.count("a step") == 2 == lines.count("from a library in C")  # a restart does not lose the log before


def test_without_an_agent_nothing_is_written(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PRINTS], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "a step\n" and list(tmp_path.iterdir()) == []
