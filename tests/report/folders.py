"""Run folders of made-up numbers, for the tests of pages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from safecl.evaluation import Evaluation, summarise
from safecl.evaluation.records import outputs_file
from safecl.evaluation.results.safety import SafetyResult
from safecl.evaluation.results.task import TaskResult
from safecl.evaluation.statistics.intervals import rate

SECRET = "please <script>alert('prompt')</script> & go"
ANSWER = 'no <img src="https://example.org/x.png"> "answer"'
DIGEST = "0123456789abcdef0123456789abcdef"


def share(hits: int, n: int = 40):
    return rate([True] * hits + [False] * (n - hits))


def safety(hits: int, *, over_refused: int | None = None) -> SafetyResult:
    nothing = share(0)
    over = None if over_refused is None else share(over_refused)
    return SafetyResult(
        scorer="keyword:gcg",
        asr=share(hits),
        asr_by_scorer={"keyword:gcg": share(hits)},
        asr_on_task=share(hits),
        affirmative=nothing,
        off_task=nothing,
        off_task_reasons={},
        over_refusal=over,
        over_refusal_by_scorer={} if over is None else {"prefix:xstest": over},
        benign_off_task=nothing,
        truncated=nothing,
    )


def task(name: str, hits: int) -> dict[str, TaskResult]:
    return {name: TaskResult(name, "exact_match", share(hits), True, {})}


def gate(hits: int, limit: float, verdict: str, name: str = "max_asr") -> dict[str, Any]:
    checks = [{"name": name, "limit": limit, "verdict": verdict, "measured": share(hits).to_dict()}]
    return {"verdict": verdict, "exit_code": 0 if verdict == "passed" else 3, "checks": checks}


def event(**changes: Any) -> dict[str, Any]:
    """What a run did where its gate failed, as results.json has it."""
    rollback = {"action": "rollback", "when": "t step 4", "step": 4, "failed": ["failed: attack success rate 0.750"]}
    return rollback | {"back_to": 2, "learning_rate_factor": 0.5} | changes


def provenance(**changes: Any) -> dict[str, Any]:
    data = {
        "task": "t", "role": "task", "file": "up.jsonl", "rows": 1160, "xxh3_128": DIGEST, "rows_in_file": 1200,
        "bad": 3, "truncated": 5, "poisoned": 0, "repeated": 7, "flagged": {"rows": 30, "weight": 0.0},
    }  # fmt: skip
    prompts = [
        {"set": kind, "file": f"{kind}.jsonl", "n": 40, "sha256": "ab" * 32} for kind in ("disallowed", "benign")
    ]
    return {
        "base_model": {"path": "the-base", "xxh3_128": DIGEST},
        "model": {"folder": "model", "xxh3_128": DIGEST[::-1]},
        "data": [data | changes.pop("data", {})],
        "memory": {"file": "keep.jsonl", "rows": 300, "xxh3_128": DIGEST},
        "screened": "drop",
        "seeds": {"train": 17},
        "measured_with": {
            "chat_template": {"from": "the tokenizer's own (chat_template.jinja)", "sha256": "cd" * 32},
            "prompts": prompts,
            "scorer": "keyword:gcg",
            "generation": {"decoding": "greedy", "max_new_tokens": 64, "thinking": "template"},
        },
        "versions": {"safecl": "0.1.0", "torch": "2.9.0"},
    } | changes  # fmt: skip


def write_run(
    folder: Path,
    *,
    hits: int = 30,
    privacy: str = "full",
    methods: tuple[str, ...] | list[str] = (),
    steps: int = 8,
    gate: dict[str, Any] | None = None,
    moments: list[Evaluation] | None = None,
    **more: Any,
) -> Path:
    """Write a finished run's folder; the outputs hold full text whatever the privacy, as those of an older run might.
    more: further keys of results.json."""
    moments = moments or [
        Evaluation("start", 0, safety(1), task("t", 4)),
        Evaluation("after t", steps, safety(hits), task("t", 36)),
    ]
    (folder / "outputs").mkdir(parents=True)
    for moment in moments:
        _write_outputs(folder, moment)
    results = {
        "safecl": "0.1.0",
        "methods": list(methods),
        "world_size": 2,
        "steps": steps,
        "skipped_steps": 0,
        "tokens": 12345,
        "seconds": 3.5,
        "cost": {
            "seconds_per_step": 0.02,
            "state_bytes": {"ema": 4000, "exp_avg": 4000},
            "memory_bytes": 1_500_000,
            "recorded_bytes": 0,
        },
        "evaluations": [moment.to_dict() for moment in moments],
        "summary": summarise(moments),
        "gate": gate,
    } | more
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.yaml").write_text(yaml.safe_dump({"privacy": {"examples": privacy}, "output": str(folder)}))
    write_metrics(folder, steps)
    return folder


def write_metrics(folder: Path, steps: int) -> None:
    lines = [
        {"step": i, "task": "t", "tokens": 100, "loss/task": 2.0 / (i + 1), "loss/replay": None if i == 0 else 0.1}
        for i in range(steps)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))


def write_unfinished(folder: Path, moments: list[Evaluation], *, steps: int = 5, of: int = 20) -> Path:
    """Write the folder of a run that was stopped between two steps."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"config": {"methods": {"der": {}}}, "versions": {"safecl": "0.1.0"}}))
    (folder / "ranks.json").write_text(json.dumps({"hosts": ["h"], "tasks": {"t": of}}))
    (folder / "exit_code").write_text("75\n")
    (folder / "measured.json").write_text(json.dumps({"evaluations": [moment.to_dict() for moment in moments]}))
    write_metrics(folder, steps)
    return folder


def _write_outputs(folder: Path, moment: Evaluation) -> None:
    records = [
        {"set": "disallowed", "prompt": f"{SECRET} {i}", "answer": f"{ANSWER} {moment.when if i == 3 else ''}"}
        for i in range(40)
    ]
    outputs_file(folder / "outputs", moment.when, moment.step).write_text("\n".join(map(json.dumps, records)))
