"""The demonstration is killed with all its processes, and finishes when it is started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS_TO_GET_THERE = 240

# The demonstration with one arm, few steps and few prompts, on one rank.
SHORT = """
import sys
from pathlib import Path

from safecl.demo import materials, run
materials.ALIGN_STEPS, materials.TASK_STEPS, materials.CHECKPOINT = 6, 12, {"every": 2, "keep": 1}
safety, train = materials._safety, materials._train
materials._safety = lambda folder: safety(folder) | {"max_prompts": 4, "max_new_tokens": 2}
materials._train = lambda *values, **settings: train(*values, **settings) | {"allow_few_steps": True}
methods = {"der": {}, "ewc": {"sign_batches": 2, "rows_per_batch": 4}, "ema": {"horizon": 0.3}}
arms = [materials.Arm("kept", "kept", methods), materials.Arm("plain", "plain", {})]
sys.exit(run.run_demo(Path(sys.argv[1]), arms=arms, num_ranks=1))
"""


def start(folder: Path) -> subprocess.Popen:
    environment = {**os.environ, "SAFECL_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SHORT, str(folder / "demo")]
    return subprocess.Popen(
        command,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=folder,
    )


def kill_when(process: subprocess.Popen, there: Path, lines: int) -> None:
    """kill -9 of the whole process group as soon as a file has so many lines."""
    deadline = time.monotonic() + SECONDS_TO_GET_THERE
    while not there.exists() or there.read_text().count("\n") < lines:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{there} did not come"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_demonstration_killed_in_an_arm_finishes_when_it_is_started_again(tmp_path):
    demo = tmp_path / "demo"
    kill_when(start(tmp_path), demo / "kept" / "metrics.jsonl", lines=5)
    again = start(tmp_path)
    said, _ = again.communicate(timeout=SECONDS_TO_GET_THERE)
    assert again.returncode == 0, said
    assert "finished after 6 steps" in said and "resuming from step-0000000" in said
    for run, steps in (("aligned", 6), ("kept", 12), ("plain", 12)):
        assert json.loads((demo / run / "results.json").read_text())["steps"] == steps
        metrics = [json.loads(line)["step"] for line in (demo / run / "metrics.jsonl").read_text().splitlines()]
        assert metrics == list(range(steps))
