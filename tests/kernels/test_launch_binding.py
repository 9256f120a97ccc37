"""Launches of the Triton kernels without a GPU: their arguments bind, specialise and compile as safecl passes them, in
the installed Triton and in those of other torch versions."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OTHERS = ROOT / ".torch_ext" / "triton"
"""Folder of the other versions, which git ignores; a version that is missing is downloaded once."""
KERNELS = {
    "ema_kernel", "fisher_kernel", "penalty_kernel", "norm_kernel", "adamw_kernel", "sum_kernel", "dense_rows_kernel",
    "topk_rows_kernel",
}  # fmt: skip


def launched(*architectures: int, triton: Path | None = None) -> dict:
    """Launch everything on a stand-in driver, with the Triton of this folder first on the path."""
    path = [str(folder) for folder in (triton, ROOT) if folder is not None]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.kernels.launch_binding", *map(str, architectures)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def installed() -> dict:
    """What is found with the installed Triton."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    return launched(90)


def test_another_number_of_replayed_tokens_or_another_weight_compiles_nothing_again(installed):
    assert installed["programs"] == installed["programs"][:1] * 5 and installed["programs"][0] >= 2


def test_every_launch_binds_in_the_installed_triton(installed):
    found = installed
    assert not found["problems"], "\n".join(found["problems"])
    assert set(found["launches"]) == KERNELS and min(found["launches"].values()) >= 6


@pytest.mark.long
@pytest.mark.parametrize("version", ["3.4.0", "3.6.0", "3.7.1"])
def test_every_launch_binds_in_this_triton(version):
    folder = OTHERS / version
    if not (folder / "triton").is_dir():
        options = ["-q", "--no-deps", "--only-binary=:all:", "--target", str(folder), f"triton=={version}"]
        done = subprocess.run([sys.executable, "-m", "pip", "install", *options], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"triton {version} cannot be downloaded: {done.stderr.strip().splitlines()[-1:]}")
    found = launched(80, 90, 100, triton=folder)
    assert found["triton"] == version and not found["problems"], "\n".join(found["problems"])
    assert set(found["launches"]) == KERNELS
