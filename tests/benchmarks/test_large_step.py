"""The step of a large model on tensors without data: it is complete, and every byte of it is counted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_step_without_data_makes_all_state_and_stays_near_the_plan(tmp_path):
    out = tmp_path / "step.json"
    command = [sys.executable, "benchmarks/engine_step.py", "--model", "tiny", "--fake", "--steps", "1", "--out", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(out.read_text())
    side = report["sides"]["safecl"]
    weights = side["weights"]
    # weights and reference in bf16, master weights, Fisher in bf16, EMA; and a bf16 copy of DeepSpeed's
    assert 0 <= side["bytes_when_built"] - (2 + 2 + 4 + 2 + 4) * weights <= 2.1 * weights
    assert abs(side["bytes_at_the_end"] - side["bytes_when_built"] - 8 * weights) <= 0.02 * 8 * weights  # moments
    assert side["peak_bytes"] > side["bytes_at_the_end"] + 4 * weights  # gradients
    assert 0.8 <= report["summary"]["memory"]["ratio"] <= 1.3
    assert "peak_bytes" in report["sides"]["plain"]
