"""The step of a large model on tensors without data: it is complete, and every byte of it is counted and planned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks import ROOT
from benchmarks.engine import large_step
from benchmarks.planning import planned_memory


def step(out: Path, *options: str) -> dict:
    """The report of a step without data."""
    command = [sys.executable, "-m", "benchmarks.engine.step", "--fake", "--out", out, *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())


def test_a_step_without_data_makes_all_state_and_stays_near_the_plan(tmp_path):
    report = step(tmp_path / "step.json", "--model", "tiny", "--steps", "1")
    side = report["sides"]["safecl"]
    weights = side["weights"]
    # weights and reference in bf16, master weights, Fisher in bf16, EMA; and a bf16 copy of DeepSpeed's, and the rows
    assert 0 <= side["bytes_when_built"] - (2 + 2 + 4 + 2 + 4) * weights <= 2.1 * weights + 10**5
    assert abs(side["bytes_at_the_end"] - side["bytes_when_built"] - 8 * weights) <= 0.02 * 8 * weights  # moments
    assert side["peak_bytes"] > side["bytes_at_the_end"] + 4 * weights  # gradients
    assert 0.8 <= report["summary"]["memory"]["ratio"] <= 1.3
    assert "peak_bytes" in report["sides"]["plain"]


def test_a_rank_of_64_constructs_its_part_of_a_wide_model_within_the_bound_of_the_plan(tmp_path):
    """Two layers of 70B in ZeRO-3, so that every buffer that depends on a layer, a parameter or the vocabulary has its
    real size. `planned_memory.py` does the same with all layers."""
    options = ["--model", "70b", "--layers", "2", "--stage", "3", "--ranks", "64", "--offload", "none"]
    report = step(tmp_path / "step.json", *options, "--sides", "safecl", "--steps", "3", "--micro-batches", "1")
    side, weights = report["sides"]["safecl"], report["sides"]["safecl"]["weights"]
    reference, share = 2 * weights, weights / 64
    # weights, master weights, gradients, Fisher, EMA; and DeepSpeed's bucket
    state = (2 + 4 + 4 + 2 + 4) * share + 4 * 5e8
    assert abs(side["bytes_when_built"] - reference - state) <= 0.1 * state
    assert abs(side["bytes_at_the_end"] - side["bytes_when_built"] - 8 * share) <= 0.05 * state  # moments
    assert report["summary"]["memory"]["ratio"] <= 1.05, report["summary"]


def test_70b_on_eight_gpus_of_80_gb_fits_by_construction():
    """All that was constructed, without the state that lies in host memory whatever else does: weights in bf16, master
    weights, moments, gradients twice, Fisher in bf16, EMA, and the node's reference weights."""
    found = json.loads((ROOT / "benchmarks" / "results" / "planned-memory.json").read_text())["70b 8 all"]
    weights = 68_976_648_192
    in_host_memory = (2 + 4 + 8 + 8 + 2 + 4) * weights / 8 + 2 * weights
    assert 0 < found["peak"] - in_host_memory < 80e9


def test_locked_memory_is_compared_with_the_state_that_the_plan_has_in_host_memory():
    options = planned_memory.setting("tiny", 1, "state")
    options.device, options.fake = "cuda", False
    state = (2 + 4) * sum(p.numel() for p in large_step.structure(options).parameters())  # Fisher and EMA
    found = large_step.page_locked_beside_the_plan(state + 4096, options)
    assert found == {"locked": state + 4096, "planned": state, "met": True}
    assert not large_step.page_locked_beside_the_plan(state + 2**21, options)["met"], "rounded up"


def test_what_was_constructed_is_compared_with_the_plan_of_today():
    found, shapes = json.loads(planned_memory.RESULT.read_text()), {}
    for key, row in found.items():
        model, ranks, offload = key.split()
        shape = shapes[model] = shapes.get(model) or planned_memory.shape_of(model)
        setting = planned_memory.setting(model, int(ranks), offload)
        planned = large_step.planned_bytes(setting, shape)
        assert planned == row["planned"], f"{key}: python -m benchmarks.planning.planned_memory --fresh makes it again"


def test_the_page_shows_every_setting_and_all_are_within_the_bound():
    found = json.loads(planned_memory.RESULT.read_text())
    assert list(found) == planned_memory.KEYS, "python -m benchmarks.planning.planned_memory constructs what is missing"
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert page.split("<!-- constructed -->\n")[1].split("\n<!-- end -->")[0] == planned_memory.table(found)
    low, high = planned_memory.BOUND
    assert all(low <= row["ratio"] <= high for row in found.values()), found
