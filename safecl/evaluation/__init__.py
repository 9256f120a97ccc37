"""Safety scorers, utility metrics, intervals and the gate. Names are imported on first use: scoring and checking text needs no torch."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "EvalModel": "model",
    "Evaluation": "evaluation",
    "GateCheck": "gates",
    "GateResult": "gates",
    "HFEvalModel": "model",
    "Mean": "intervals",
    "Rate": "intervals",
    "SCORERS": "scorers",
    "SafetyResult": "safety",
    "TaskResult": "task",
    "check_disjoint": "contamination",
    "check_gate_is_decidable": "gates",
    "evaluate": "evaluation",
    "evaluate_folder": "standalone",
    "evaluate_safety": "safety",
    "evaluate_target": "standalone",
    "evaluate_task": "task",
    "find_overlaps": "contamination",
    "gate": "gates",
    "generate_greedy": "generate",
    "judge_gate": "evaluation",
    "load_scorer": "judges",
    "log_likelihoods": "likelihood",
    "rate_of_verdicts": "judges",
    "results_table": "tables",
    "smallest_passing_size": "intervals",
    "summarise": "evaluation",
    "wilson": "intervals",
    "write_outputs": "outputs",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'safecl.evaluation' has no attribute {name!r}")
    return getattr(importlib.import_module(f"safecl.evaluation.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
