"""launch/gpu_suite.sh on a machine without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def suite(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [ROOT / "launch/gpu_suite.sh", *arguments], env=env, capture_output=True, text=True, timeout=100, check=False
    )


def test_every_section_has_a_time_limit_and_runs_files_that_exist(tmp_path):
    listed = suite(tmp_path, "--list").stdout.splitlines()
    assert [line.split()[0] for line in listed][:4] == ["env", "build", "flat-tests", "flat-bench"]
    for line in listed:
        name, limit, *command = line.split()
        assert 0 < int(limit) <= 600, name
        assert all(
            (ROOT / word).is_file()
            for word in command
            if re.fullmatch(r"(launch|tests|benchmarks)/\S+\.py|setup\.py", word)
        ), line


def test_a_section_that_does_not_exist_is_refused_by_name(tmp_path):
    done = suite(tmp_path, "flat-test")
    assert done.returncode == 2 and "no section flat-test; there are: env build flat-tests" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_stops_after_the_first_section_and_says_why(tmp_path):
    done = suite(tmp_path, "flat-tests")
    assert done.returncode == 1 and "torch sees no CUDA device" in done.stdout
    assert [(s["section"], s["status"]) for s in json.loads((tmp_path / "summary.json").read_text())] == [("env", 1)]
