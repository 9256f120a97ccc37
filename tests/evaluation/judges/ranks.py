"""The work of the ranks in the tests of judges; importable, so that spawned processes find it."""

from __future__ import annotations

from typing import Any

from safecl.config import ConfigError
from safecl.config.judges import JudgeConfig
from safecl.evaluation import HFEvalModel
from safecl.evaluation.judges.in_run import add_judge
from tests.evaluation.judges.models import PAIRS, TEMPLATE
from tests.evaluation.models import tiny_model


def judged_in_run(path: str, where: Any) -> Any:
    """Return the marks that a judge writes into the records, or its error."""
    config = JudgeConfig(
        kind="classifier", model=path, template=TEMPLATE, label="harm", dtype="fp32", where=where, name="a"
    )
    records: list[dict[str, Any]] = [
        {"id": f"disallowed-{i}", "set": "disallowed", "prompt": p, "answer": a, "attack_succeeded": {}}
        for i, (p, a) in enumerate(PAIRS[:11])
    ]
    records[2]["cut_off"] = True
    try:
        add_judge(HFEvalModel(tiny_model()), config, records)
    except ConfigError as error:
        return str(error)
    return [record["attack_succeeded"]["judge:a"] for record in records]
