"""The Makefile gives each demonstration the threads that its ranks can use, and `make clean` removes their folders. A
script stands in for Python, so nothing is installed and nothing runs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORES = 6


@pytest.fixture
def venv(tmp_path) -> Path:
    """A finished installation whose Python says how many threads it gets."""
    (tmp_path / "venv" / "stamps").mkdir(parents=True)
    (tmp_path / "venv" / "bin").mkdir()
    python = tmp_path / "venv" / "bin" / "python"
    python.write_text('#!/bin/sh\necho "threads $OMP_NUM_THREADS"\n')
    python.chmod(0o755)
    for stamp in ("venv", "torch", "safecl", "real"):
        (tmp_path / "venv" / "stamps" / stamp).touch()
    return tmp_path / "venv"


def make(venv: Path, *arguments: str, threads: str | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MAKEFLAGS")}
    environment |= {"OMP_NUM_THREADS": threads} if threads is not None else {}
    command = ["make", "-C", str(ROOT), f"VENV={venv}", f"CORES={CORES}", *arguments]
    return subprocess.run(command, env=environment, text=True, capture_output=True, check=True).stdout


@pytest.mark.parametrize(("target", "threads"), [("demo", CORES // 2), ("demo-real", CORES), ("demo-all", CORES // 2)])
def test_two_ranks_share_the_cores_and_one_rank_gets_all(venv, target, threads):
    assert f"threads {threads}\n" in make(venv, target)


@pytest.mark.parametrize("target", ["demo", "demo-real"])
def test_the_users_number_of_threads_wins(venv, target):
    assert "threads 5\n" in make(venv, target, threads="5")
    assert "threads 5\n" in make(venv, target, "OMP_NUM_THREADS=5")


def test_clean_removes_every_demonstration(venv):
    removed = make(venv, "--dry-run", "clean", "DEMO=shown").split("rm -rf", 1)[1].splitlines()[0].split()
    assert {"shown", "shown-all", "shown-real"} <= set(removed)
