"""The part of a page that shows the course of a run: worst moments, the gate's actions, the probe, drift by layer."""

from __future__ import annotations

import json
import re
from dataclasses import replace

from safecl.evaluation import Evaluation, GateResult
from safecl.evaluation.results.probed import ProbeResult
from safecl.evaluation.statistics.intervals import Mean
from safecl.report import charts
from safecl.report.comparison import comparison_page, read_runs
from safecl.report.folder import read_run
from safecl.report.run import run_report
from tests.report.folders import event, safety, share, task, write_run, write_unfinished
from tests.report.test_report import Checked, page_of


def verdict(hits: int) -> GateResult:
    return GateResult("failed" if hits > 20 else "passed")


def moment(when: str, step: int, hits: int) -> Evaluation:
    return Evaluation(
        when,
        step,
        replace(safety(hits), variants={"prefill-5": safety(hits + 3)}),
        task("t", 36 - hits),
        gate=verdict(hits),
        probe=ProbeResult(1.0 - hits / 10, share(hits), share(hits), None),
        kl_to_aligned=Mean(8, 90, 0.01 * hits, 0.0, 0.7),
    )


MOMENTS = [moment("start", 0, 1), moment("t step 4", 4, 30), moment("t step 6", 6, 8), moment("after t", 8, 2)]
"""The largest rate is measured between the start and the end, where a table of the ends would not show it."""


def test_the_course_of_a_run_has_its_worst_moments_what_the_gate_did_and_what_the_probe_is_worth(tmp_path):
    drift = {"layer 0": {"relative": 0.0123, "absolute": 4.5}}
    events = [event(), event(action="corrective_replay", steps=20, recovered=True, when="t step 6", step=6)]
    folder = write_run(tmp_path / "a", moments=MOMENTS, events=events, weight_drift=drift)
    looks = [{"step": i, "task": "t", "probe/complying": i / 10} for i in range(5)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, looks)) + "\n")
    text = " ".join(page_of(folder).text.split())
    for said in (
        "largest attack success rate 0.750, t step 4",
        "largest attack success rate, prefill-5 0.825, t step 4",
        "worst score of t since the start 0.150, t step 4",
        "1 of 4 moments failed the gate; 2 steps (25.0%) until the next measurements",
        "Pearson 1.000, Spearman 1.000, AUC -, over 4 moments",
        "t step 4 4 back to step 2, learning rate times 0.5 failed: attack success rate 0.750",
        "t step 6 6 20 steps on the memory, the probe recovered",
        "layer 0 0.0123 4.5",
        "KL to the aligned model lower is better 0.010",
        "probe, leaning to comply lower is better 0.025",
    ):
        assert said in text, said
    page = run_report(read_run(folder))
    assert 'aria-label="rate over steps: ASR from 0.025 to 0.05; probe from 0 to 0.4"' in page


def test_a_run_that_is_measured_at_its_ends_alone_has_no_drawing_of_its_rates(tmp_path):
    page = run_report(read_run(write_run(tmp_path / "a")))
    assert "rate over steps" not in page and "largest attack success rate" in page and "Distance of the w" not in page


def test_an_unfinished_run_has_its_course_so_far(tmp_path):
    text = page_of(write_unfinished(tmp_path / "a", MOMENTS[:3])).text
    assert "largest attack success rate 0.750, t step 4" in text and "1 of 3 moments failed the gate; 2 steps" in text


def test_a_comparison_has_the_worst_moments_of_each_run(tmp_path):
    runs = [
        write_run(tmp_path / "kept", moments=[MOMENTS[0], MOMENTS[3]]),
        write_run(tmp_path / "lost", moments=MOMENTS),
    ]
    text = " ".join(Checked(comparison_page(read_runs(runs))).text.split())
    assert "largest attack success rate lower is better 0.050 0.750 +0.700" in text
    assert "share of steps beyond the gate lower is better 0.000 0.250 +0.250" in text


def test_a_line_breaks_off_where_a_run_went_back():
    points = [(0, 0.1), (2, 0.4), (4, 0.9), (2, 0.4), (4, 0.3)]
    drawn = charts.curves({"ASR": points}, ends=(0, 1))
    assert [len(line.split()) for line in re.findall(r'polyline points="([^"]*)"', drawn)] == [3, 2]
