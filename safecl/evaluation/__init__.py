"""Safety scorers, utility metrics, intervals and the gate. Names are imported on first use, so that scoring and
checking text needs no torch."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "EvalModel": "answers.model",
    "Evaluation": "measure",
    "GateCheck": "gates.gate",
    "GateResult": "gates.gate",
    "HFEvalModel": "answers.model",
    "Mean": "statistics.intervals",
    "Rate": "statistics.intervals",
    "SCORERS": "scoring.keywords",
    "SafetyResult": "safety",
    "TaskResult": "task",
    "check_disjoint": "contamination",
    "check_gate_is_decidable": "gates.gate",
    "evaluate": "measure",
    "evaluate_folder": "standalone",
    "evaluate_safety": "safety",
    "evaluate_target": "standalone",
    "evaluate_task": "task",
    "find_overlaps": "contamination",
    "gate": "gates.gate",
    "generate_greedy": "answers.generate",
    "judge_gate": "gates.gate",
    "load_scorer": "scoring.judges",
    "log_likelihoods": "answers.likelihood",
    "rate_of_verdicts": "scoring.judges",
    "results_table": "tables",
    "smallest_passing_size": "statistics.intervals",
    "summarise": "measure",
    "wilson": "statistics.intervals",
    "write_outputs": "records",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'safecl.evaluation' has no attribute {name!r}")
    return getattr(importlib.import_module(f"safecl.evaluation.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
