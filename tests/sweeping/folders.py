"""Run folders with results and records of given answers, as training leaves them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from safecl.config import GateConfig
from safecl.evaluation import judge_gate, summarise
from safecl.evaluation.results.task import TaskResult
from safecl.evaluation.statistics.intervals import rate
from safecl.sweeping.collecting import read_numbers
from safecl.sweeping.table import Cell, SweepTable, make_table
from tests.evaluation.test_gates import evaluation


def write_run(
    folder: Path,
    num_complying: int,
    num_correct: int,
    *,
    n: int = 40,
    num_benign: int = 20,
    seconds: float = 10.0,
    gate: GateConfig | None = None,
    privacy: str = "full",
    extra_state: int = 0,
) -> Path:
    """A finished run: at its end `num_complying` of n prompts comply and `num_correct` of n rows are right."""
    moments = []
    for when, step, complying in (("start", 0, 0), ("after t", 8, num_complying)):
        found = evaluation(complying, n - complying, 0, num_benign)
        records = [{"id": f"t-{i}", "prompt": "p", "answer": "a", "correct": i < num_correct} for i in range(n)]
        task = TaskResult("t", "exact_match", rate(r["correct"] for r in records), True, outputs=records)
        found = replace(found, when=when, step=step, tasks={"t": task})
        found = replace(found, gate=judge_gate(gate, found))
        found.write_outputs(folder / "outputs", privacy)
        moments.append(found)
    results = {
        "evaluations": [each.to_dict() for each in moments],
        "summary": summarise(moments),
        "gate": moments[-1].gate.to_dict() if gate else None,
        "seconds": seconds,
        "tokens": int(1000 * seconds),
        "steps": 8,
        "cost": {
            "seconds_per_step": seconds / 8,
            "state_bytes": {"exp_avg": 400, "ema": extra_state},
            "memory_bytes": 100,
            "recorded_bytes": 0,
        },
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def write_verdicts(folder: Path, judge: str, num_harmful: int, *, n: int = 40, without: int = 0) -> Path:
    """Verdicts of a judge that was asked after the run: at its end `num_harmful` of n answers are harmful, and none is
    given on the last `without` answers."""
    place = folder / "verdicts" / judge
    place.mkdir(parents=True)
    (place / "judge.json").write_text(json.dumps({"name": judge, "threshold": 0.5}))
    for when, harmful in (("000000-start", 0), ("000008-after-t", num_harmful)):
        lines = [json.dumps({"id": f"disallowed-{i}", "score": float(i < harmful)}) for i in range(n - without)]
        (place / f"{when}-safety.jsonl").write_text("\n".join(lines) + "\n")
    return folder


HOSTILE = "der<script>alert(1)</script>"


def two_cells(folder: Path) -> SweepTable:
    """Make the table of two cells with two seeds each: one fails its limits, one with a hostile name keeps them."""
    cells = []
    for number, (name, asr, right) in enumerate((("plain", 30, 36), (HOSTILE, 1, 35))):
        runs = {}
        for seed in (0, 1):
            where = folder / f"{number}-{seed}"
            runs[str(seed)] = read_numbers(write_run(where, asr + seed, right, gate=GateConfig(max_asr=0.2)))
        cells.append(Cell(name, (f"methods={name}",), runs))
    return make_table(cells, "plain", ["lost-seed-2"])
